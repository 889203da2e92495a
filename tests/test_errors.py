"""Others' errors in our lines: what a converter or a runtime says, and what of it is no fault of theirs."""
from __future__ import annotations

import pytest

from utils.errors import UserError, error_lines, first_line, foreign_errors, script, short_reason
from utils.extras import import_extra


@pytest.mark.parametrize(("error", "lines", "first", "reason"), [
    (ValueError("a  b\n\tc\n"), ["a  b", "\tc"], "ValueError: a  b", "a b c"), (ValueError(), ["ValueError"], "ValueError", "ValueError"),
    (ValueError(" \n "), ["ValueError"], "ValueError", "ValueError"),
])  # fmt: skip
def test_what_an_error_says(error, lines, first, reason):
    assert (error_lines(error), first_line(error), short_reason(error)) == (lines, first, reason)


def test_a_long_reason_is_cut():
    """A word that is longer than the line leaves its start to be read."""
    assert short_reason(ValueError("abc " * 99), 12) == "abc abc ab …"
    assert short_reason(ValueError("x" * 99), 5) == "xxx …" and short_reason(ValueError("x" * 5), 5) == "xxxxx"


def test_foreign_errors():
    with pytest.raises(UserError, match=r"^it fails: a b$"), foreign_errors("it fails"):
        raise TypeError("a\nb")


@pytest.mark.parametrize(("name", "line"), [
    ("torch", "torch: pip install -r requirements.txt"), ("torch.nothing", "the Python module torch.nothing: install the package that has it"),
    ("google.protobuf", "the Python module google.protobuf: install the package that has it"),
])  # fmt: skip
def test_a_missing_module(name, line, capsys):
    @script
    def main(argv):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert main([]) == 2 and capsys.readouterr().err == f"error: needs {line}\n"


def test_an_optional_package_whose_library_is_missing(monkeypatch):
    def broken(package):
        raise ImportError("libgomp.so.1: cannot open shared object file", name=package)

    monkeypatch.setattr("utils.extras.importlib.import_module", broken)
    with pytest.raises(UserError, match=r"^openvino: is installed and can't be loaded: libgomp\.so\.1: cannot open"):
        import_extra("openvino")


def test_a_loader_that_is_killed(capsys):
    @script
    def main(argv):
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Bus error. Its shared memory is full.")

    assert main([]) == 2 and capsys.readouterr().err.startswith("error: a process that loads images has ended (DataLoader worker (pid 12)")


@pytest.mark.parametrize("error", [
    UserError("ours"), OSError(28, "No space left on device"), MemoryError(), RuntimeError("CUDA out of memory. Tried"), KeyboardInterrupt(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
])  # fmt: skip
def test_no_fault_of_theirs(error):
    with pytest.raises(type(error)) as raised, foreign_errors("it fails"):
        raise error
    assert raised.value is error
