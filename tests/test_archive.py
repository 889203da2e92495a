"""Hostile, broken and foreign files: each gives one line that says what it is, and nothing in it is run."""
from __future__ import annotations

import io
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.archive import Archive
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.errors import UserError


def write_zip(path: Path, data: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as bundle:
        bundle.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            bundle.writestr(f"archive/data/{key}", content)
    return path


def refusal(path: Path) -> str:
    """The one line that reading gives."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert len(line) < len(str(path)) + 450
    return line


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


# Every way of naming a thing in a pickle and calling it with the arguments `args` (opcodes that leave a tuple, or none but items).


def by_global(module: str, name: str, args: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + args + b"tR."


def by_stack_global(module: str, name: str, args: bytes) -> bytes:
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + args + b"tR."


def by_inst(module: str, name: str, args: bytes) -> bytes:
    return b"(" + args + b"i" + f"{module}\n{name}\n".encode() + b"."


def by_obj(module: str, name: str, args: bytes) -> bytes:
    return b"\x80\x02(c" + f"{module}\n{name}\n".encode() + args + b"o."


def by_newobj(module: str, name: str, args: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + args + b"t\x81."


def by_newobj_ex(module: str, name: str, args: bytes) -> bytes:
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + args + b"t}\x92."


def by_memo(module: str, name: str, args: bytes) -> bytes:
    return b"\x80\x02" + text(module) + b"q\x01" + text(name) + b"q\x020" + b"0h\x01h\x02\x93q\x070h\x07(" + args + b"tR."


def hidden_in_a_model(module: str, name: str, args: bytes) -> bytes:
    call = by_global(module, name, args)[2:-1]
    return b"\x80\x02}(" + text("model") + b"cmodels.yolo\nModel\n)\x81}" + text("yaml") + call + b"sbu."


def as_build_state(module: str, name: str, args: bytes) -> bytes:
    return b"\x80\x02cmodels.yolo\nModel\n)\x81" + by_global(module, name, args)[2:-1] + b"b."


def as_key(module: str, name: str, args: bytes) -> bytes:
    return b"\x80\x02}" + by_global(module, name, args)[2:-1] + b"Ns."


DELIVERIES = (by_global, by_stack_global, by_inst, by_obj, by_newobj, by_newobj_ex, by_memo, hidden_in_a_model, as_build_state, as_key)
FORBIDDEN = {
    "os": "system popen execvp remove", "posix": "system", "nt": "system", "subprocess": "Popen check_output run", "pty": "spawn",
    "builtins": "eval exec compile getattr setattr __import__ open globals map type object print", "__builtin__": "eval apply execfile",
    "operator": "attrgetter methodcaller itemgetter", "functools": "partial reduce", "itertools": "starmap", "runpy": "run_path _run_code",
    "webbrowser": "open", "importlib": "import_module", "importlib._bootstrap": "_call_with_frames_removed", "pkgutil": "resolve_name",
    "torch": "load compile", "torch.hub": "load load_state_dict_from_url", "torch.jit": "load", "torch.package": "PackageImporter",
    "torch.storage": "_load_from_bytes", "torch.serialization": "load", "torch.utils.cpp_extension": "load_inline",
    "torch.utils.model_zoo": "load_url", "torch.ops": "load_library", "torch.classes": "load_library",
    "torch._utils": "_import_dotted_name _rebuild_qtensor", "torch.multiprocessing.reductions": "rebuild_storage_fd",
    "torch.distributed.rpc": "rpc_sync", "torch._dynamo": "optimize", "torch.fx.graph_module": "reduce_graph_module", "numpy": "load memmap",
    "numpy.f2py": "compile", "numpy.testing._private.utils": "runstring", "numpy.lib.npyio": "load", "pandas": "read_pickle", "joblib": "load",
    "codecs": "encode decode open", "_codecs": "decode", "pickle": "loads", "_pickle": "Unpickler", "marshal": "loads", "dill": "loads",
    "cloudpickle.cloudpickle": "_make_function", "types": "FunctionType CodeType", "code": "InteractiveInterpreter", "codeop": "compile_command",
    "timeit": "timeit", "cProfile": "run", "profile": "run", "pdb": "run", "bdb": "Bdb", "trace": "Trace", "doctest": "debug_script",
    "idlelib.run": "Executive", "lib2to3.pgen2.grammar.Grammar": "loads", "pip": "main", "venv": "create", "ensurepip": "bootstrap",
    "site": "main", "test.support.script_helper": "x", "ctypes": "CDLL", "ctypes.util": "find_library", "socket": "create_connection",
    "ssl": "SSLContext", "smtplib": "SMTP", "ftplib": "FTP", "http.client": "HTTPConnection", "urllib.request": "urlretrieve", "requests": "get",
    "aiohttp": "ClientSession", "asyncio": "create_subprocess_shell", "multiprocessing": "Process", "multiprocessing.util": "spawnv_passfds",
    "threading": "Thread", "shutil": "rmtree copy", "pathlib": "os", "tempfile": "mkstemp", "io": "open FileIO", "_io": "open",
    "zipfile": "ZipFile", "tarfile": "open", "sqlite3": "connect", "logging.config": "fileConfig", "argparse": "FileType",
    "collections": "UserDict defaultdict", "copyreg": "_reconstructor add_extension", "copy_reg": "__newobj__", "sys": "exit settrace",
    "gc": "get_objects", "inspect": "getattr_static", "ast": "literal_eval", "uuid": "_get_command_stdout", "platform": "popen",
    "distutils.spawn": "spawn", "setuptools": "setup", "commands": "getoutput", "tensorflow.keras.models": "load_model",
    "keras.models": "load_model", "onnx": "load", "cv2": "imread", "yaml": "unsafe_load", "wandb": "restore", "comet_ml": "Experiment",
    "__mp_main__": "x",
}  # fmt: skip


@pytest.mark.parametrize("dotted", [f"{module}.{name}" for module, names in FORBIDDEN.items() for name in names.split()])
def test_a_name_that_no_checkpoint_needs_is_refused_by_name(tmp_path, dotted):
    """In every position that a pickle can call from; what would have been called could have made the sentinel."""
    module, name = dotted.rsplit(".", 1)
    sentinel = tmp_path / "sentinel"
    for deliver in DELIVERIES:
        path = write_zip(tmp_path / "hostile.pt", deliver(module, name, text(f"touch {sentinel}")))
        line = refusal(path)
        assert f"asks for {dotted}, which no checkpoint needs: refused, nothing was run" in line, deliver.__name__
    assert not sentinel.exists()


@pytest.mark.parametrize("deliver", [by_global, by_stack_global, by_inst, by_obj, by_memo, as_key])
def test_the_attacks_work_on_an_unguarded_reader(tmp_path, deliver):
    """Otherwise the test above would prove nothing."""
    sentinel = tmp_path / "sentinel"
    pickle.loads(deliver("os", "mkdir", text(str(sentinel))))
    assert sentinel.exists()


MODEL = b"\x80\x02cmodels.yolo\nModel\n"
OURS = b"\x80\x02}(" + text("format") + text("light-yolo") + text("version") + b"K\x01" + text("spec")
NETWORK = MODEL + b")\x81q\x00}(" + text("yaml") + b"}" + text("names") + b"]" + text("a") + b"a" + text("_modules")


def modules(part: bytes, count: int) -> bytes:
    """A module's state with the same submodule again and again."""
    return b"}" + text("_modules") + b"}(" + b"".join(text(str(i)) + part for i in range(count)) + b"us"


ATTACKS = {
    "dotted name through an allowed module": (by_stack_global("models.yolo", "os.system", text("true")), "models.yolo.os.system"),
    "dotted name through torch.nn": (by_stack_global("torch.nn", "Module.__init__.__globals__", b""), "torch.nn.Module.__init__"),
    "dotted torch name": (by_stack_global("torch", "hub.load", text("x")), "torch.hub.load"),
    "extension code, 1 byte": (b"\x80\x02\x82\x01.", "extension code 1"),
    "extension code, 2 bytes": (b"\x80\x02\x83\x01\x01.", "extension code 257"),
    "extension code, 4 bytes": (b"\x80\x02\x84\x01\x01\x00\x00.", "extension code 257"),
    "control characters in the name": (by_stack_global("os\x1b[2J", "system\n", b""), r"os\x1b[2J.system\n"),
    "letters that look alike": (by_stack_global("mоdels", "Model", b""), "mоdels.Model"),
    "name without end": (by_stack_global("os" * 10_000, "x", b""), "osos"),
    "class hidden behind a popped value": (b"\x80\x02cos\nsystem\n0N.", "os.system"),
    "call in a persistent id": (b"\x80\x02(" + text("storage") + b"cos\nsystem\n" + text("0") + b"NK\x01tQ.", "os.system"),
    "code after the first pickle's end": (b"\x80\x02N.cos\nsystem\n(S'true'\ntR.", "holds a value of type NoneType"),
    "inert class": (by_global("models.yolo", "Model", text("rm -rf")), "models.yolo.Model"),
    "inert function of a model package": (by_global("utils.downloads", "safe_download", text("http://x")), "utils.downloads.safe_download"),
    "inert function of torch.nn": (by_global("torch.nn.modules.module", "_addindent", text("x")), "torch.nn.modules.module._addindent"),
    "calls a text": (b"\x80\x02" + text("os.system") + b")R.", "no class"),
    "calls an instance": (MODEL + b")R)R.", "no class"),
    "calls with a text": (MODEL + text("ab") + b"R.", "no class"),
    "class by numbers": (b"\x80\x04K\x01K\x02\x93.", "no text"),
    "state on a class": (MODEL + b"}" + text("__init__") + b"Nsb.", "holds models.yolo.Model"),
    "a model that contains itself": (NETWORK + b"}" + text("model") + b"h\x00sub.", "beyond measure"),
    "a model that contains itself a thousand times": (
        NETWORK + b"}(" + text("model") + b"h\x00" + b"".join(text(str(i)) + b"h\x00" for i in range(1000)) + b"uub.", "beyond measure"),
    "a model of half a million parts": (
        MODEL + b")\x81q\x000" + MODEL[2:] + b")\x81q\x01" + modules(b"h\x00", 700) + b"b0" + NETWORK + b"}" + text("model")
        + MODEL[2:] + b")\x81" + modules(b"h\x01", 700) + b"bsub.", "beyond measure"),
    "a part with an endless name": (
        NETWORK + b"}" + text("model") + MODEL[2:] + b")\x81}" + text("_modules") + b"}" + text("a" * 1000) + MODEL[2:] + b")\x81ssbsub.",
        "beyond measure"),
    "a list of lists of lists": (OURS + b"]q\x010" + (b"](" + b"h\x01" * 10 + b"eq\x010") * 40 + b"h\x01u.", "beyond measure"),
    "a text repeated without end": (OURS + b"](" + text("x" * 100_000) + b"q\x00" + b"h\x00" * 1500 + b"eu.", "texts are repeated beyond measure"),
    "a number without end": (OURS + b"}" + text("nc") + b"\x8b" + (2500).to_bytes(4, "little") + b"\x01" * 2500 + b"su.", "beyond 64 bits"),
    "an instance as a module's name": (
        NETWORK + b"}" + text("model") + MODEL[2:] + b")\x81}" + text("_parameters") + b"}" + MODEL[2:] + b")\x81]q\x010"
        + (b"](" + b"h\x01" * 10 + b"eq\x010") * 40 + b"h\x01bNssb" + b"sub.", "not a YOLOv5 network"),
    "a spec nested too deep": (OURS + b"]" + b"\x85" * 5000 + b"u.", "beyond measure"),
    "a version that can't be printed": (
        OURS + b"N" + text("version") + b"]q\x010" + (b"](" + b"h\x01" * 10 + b"eq\x010") * 40 + b"h\x01u.", "an unknown format version"),
    "a key that can't be printed": (
        b"\x80\x02]q\x010" + (b"](" + b"h\x01" * 10 + b"eq\x010") * 40 + b"}" + MODEL[2:] + b")\x81h\x01bNs.", "holds a dict of nothing"),
    "an instance in our own format": (OURS + MODEL[2:] + b")\x81u.", "holds models.yolo.Model"),
    "no pickle at all": (b"\xff\xfe\x00\x01", "not a whole checkpoint"),
    "an empty pickle": (b"", "not a whole checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_the_machine(tmp_path, attack):
    data, named = ATTACKS[attack]
    start = time.perf_counter()
    assert named in refusal(write_zip(tmp_path / "hostile.pt", data))
    assert time.perf_counter() - start < 20


def tensor_pickle(numel: int = 4, size: tuple[int, ...] = (4,), key: str = "0", kind: str = "FloatStorage") -> bytes:
    """`{"x": tensor}` as torch.save writes it."""
    number = lambda n: b"\x8a\x09" + n.to_bytes(9, "little", signed=True)  # noqa: E731
    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"K\x01" * len(size) + b"t"
    return b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + b"\x89}tRs."


def read_x(path: Path) -> torch.Tensor:
    with Archive(path) as archive:
        return archive.plain(archive.content)["x"]


def test_a_hand_written_tensor(tmp_path):
    path = write_zip(tmp_path / "x.pt", tensor_pickle(), {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert read_x(path).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("data", "storages"), [
    (tensor_pickle(), {}),
    (tensor_pickle(), {"0": b"abc"}),
    (tensor_pickle(5, (5,)), {"0": bytes(16)}),
    (tensor_pickle(2**40, (2**40,)), {"0": bytes(16)}),
    (tensor_pickle(2**62, (2**62,)), {"0": bytes(16)}),
    (tensor_pickle(2**60 + 1, (4096,), kind="ComplexDoubleStorage"), {"0": bytes(16)}),  # 16 bytes each: 2**64 + 16, which wraps round to 16
    (tensor_pickle(kind="DoubleStorage"), {"0": bytes(16)}),
    (tensor_pickle(key="../data.pkl"), {}),
    (tensor_pickle(key="x" * 10_000), {}),
])  # fmt: skip
def test_storages_that_are_not_there(tmp_path, data, storages):
    with pytest.raises(UserError, match=r"not a whole checkpoint: .*(is missing|are declared|without a name)"):
        read_x(write_zip(tmp_path / "x.pt", data, storages))


def test_entries_of_one_name(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as bundle, pytest.warns(UserWarning, match="Duplicate"):
        bundle.writestr("archive/data.pkl", b"N.")
        bundle.writestr("archive/data.pkl", b"cos\nsystem\n.")
    assert "two entries have one name" in refusal(path)


def test_zip_bomb(tmp_path):
    path = write_zip(tmp_path / "x.pt", tensor_pickle(2**24, (2**24,)), {"0": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "compressed" in refusal(path)


def test_entries_that_share_their_bytes(tmp_path):
    """Each of the index's entries names the one big block: together they claim what the file doesn't have."""
    path = write_zip(tmp_path / "x.pt", b"N.", {"0": bytes(100_000)})
    raw = bytearray(path.read_bytes())
    end = raw.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", raw, end + 16)[0]
    entry = raw.index(b"PK\x01\x02", start + 4)
    index = bytes(raw[start:entry]) + b"".join(bytes(raw[entry:end]).replace(b"data/0", b"data/%d" % i) for i in range(10))
    path.write_bytes(raw[:start] + index + b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 11, 11, len(index), start, 0))
    assert len(zipfile.ZipFile(path).namelist()) == 11
    assert "claim more bytes" in refusal(path)


def test_encrypted_flag(tmp_path):
    path = write_zip(tmp_path / "x.pt", b"N.")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    assert "encrypted" in refusal(path)


def test_a_changed_byte_in_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.full((1000,), 7.0)}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(struct.pack("<f", 7.0) * 10) + 400] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="CRC"):
        read_x(path)


def content_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez(buffer, a=np.zeros(3))
    elif kind == "torchscript":
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    elif kind == "old":
        torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.pt", b"", "empty file"),
    ("a.pt", b"version https://git-lfs.github.com/spec/v1\n", "a text file"),
    ("a.pt", "Grüße\n".encode(), "a text file"),
    ("a.yaml", b"nc: 80\n", "a text file"),
    ("a.onnx", b"\x08\x07\x12\x07pytorch", "an ONNX network"),
    ("a.pt", b"\x08\x07\x12\x04onnx\x1a\x05", "an ONNX network"),
    ("a.tflite", b"\x1c\0\0\0TFL3", "a TFLite network"),
    ("a.pt", b"\x1c\0\0\0TFL3", "a TFLite network"),
    ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "a safetensors file"),
    ("a.pt", b"\xff\xd8\xff\xe0", "a JPEG image"),
    ("a.pt", pickle.dumps({"a": 1}), "a bare pickle; if you trust"),
    ("a.pt", b"cos\nsystem\n(S'true'\ntR.", "a text file"),
    ("a.pt", "old", "from before 1.6; if you trust where it comes from, re-save it"),
    ("a.pt", bytes(257) + b"ustar\0", "a tar archive"),
    ("a.pt", "npz", "a zip file without a checkpoint"),
    ("a.pt", "torchscript", "a TorchScript network"),
    ("a.pt", b"\x1f\x8b\x08", "a gzip archive"),
    ("a.pt", b"\0\1\2\3", "no file of torch.save"),
    ("a.pt", b"PK\x03\x04", "its end is missing"),
    ("a.pt", b"PK\x05\x06" + bytes(18), "no file of torch.save"),
])  # fmt: skip
def test_foreign_files(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content_of(content))
    assert says in refusal(path)


def small_archive(path: Path) -> bytes:
    spec = {"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3, "backbone": [], "head": []}
    save_checkpoint(path, Checkpoint(spec, ("a", "b"), {"a": torch.arange(6.0)}))
    assert load_checkpoint(path).names == ("a", "b")
    return path.read_bytes()


def test_truncation_anywhere(tmp_path):
    path = tmp_path / "x.pt"
    whole = small_archive(path)
    for length in [*range(0, 200, 7), *range(200, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refusal(path)


def test_random_damage_gives_a_line_or_the_data(tmp_path):
    """Bytes changed anywhere, the index included: a UserError, or a tree, never another exception."""
    path = tmp_path / "x.pt"
    whole, rng = small_archive(path), random.Random(0)
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            assert isinstance(load_checkpoint(path), Checkpoint)
        except UserError as error:
            assert str(error).startswith(str(path))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the texts in them
def test_mutated_pickles(tmp_path, edits):
    """Structure-aware damage: the zip stays right, so that the machine itself is reached."""
    torch.save({"model": {"a": torch.arange(6.0)}, "names": ["a", "b"]}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as bundle:
        data = bytearray(bundle.read("whole/data.pkl"))
    for place, new, removed in edits:
        place %= len(data)
        data[place : place + removed] = new
    refusal(write_zip(tmp_path / "x.pt", bytes(data), {"0": bytes(24)}))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    assert "can't be read: Permission denied" in refusal(path)
