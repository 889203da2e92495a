"""Finding, reading and writing files: every place tried is named, YAML is plain data, a write happens whole or not at all."""
from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from utils.errors import USER_ERROR, UserError, script
from utils.files import (
    ROOT,
    atomic_folder,
    atomic_write,
    did_you_mean,
    find_file,
    has_writer,
    is_writable,
    new_run_dir,
    only_writer,
    read_yaml,
    remove_leftovers,
    write_csv,
    write_yaml,
)

# Finding


def test_the_first_place_wins(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.yaml").write_text(name)
    folders = [tmp_path / "a", tmp_path / "b"]
    assert find_file("x.yaml", folders, "YAML") == tmp_path / "a" / "x.yaml"
    monkeypatch.chdir(tmp_path / "b")
    assert find_file("x.yaml", folders, "YAML") == Path("x.yaml")
    assert find_file(tmp_path / "b" / "x.yaml", folders, "YAML") == tmp_path / "b" / "x.yaml"
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    assert find_file("~/x.yaml", [], "YAML") == tmp_path / "a" / "x.yaml"


def test_every_place_tried_is_named(tmp_path):
    (tmp_path / "bccd.yaml").write_text("")
    (tmp_path / "bcd.txt").write_text("")
    with pytest.raises(UserError) as raised:
        find_file("bcd.yaml", [tmp_path, tmp_path / "none"], "data YAML")
    tried = f"bcd.yaml, {tmp_path}/bcd.yaml, {tmp_path}/none/bcd.yaml"
    assert str(raised.value) == f"bcd.yaml: no such data YAML; looked at {tried}; did you mean bccd.yaml?"
    with pytest.raises(UserError, match=r"did you mean bccd\.yaml\?$"):
        find_file("bccd", [tmp_path], "data YAML")


def test_capitals_do_not_matter_and_folders_that_were_added_are_told(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "VOC.yaml").write_text("")
    assert find_file("voc.yaml", [tmp_path / "models"], "YAML") == tmp_path / "models" / "VOC.yaml"
    with pytest.raises(UserError, match=r"^hub/VOC\.yaml: no such YAML; looked at hub/VOC\.yaml, .*; did you mean VOC\.yaml\?$"):
        find_file("hub/VOC.yaml", [tmp_path / "models"], "YAML")
    (tmp_path / "models" / "voc.YAML").write_text("")
    if len(list((tmp_path / "models").iterdir())) > 1:  # capitals count on this disk: which is meant?
        with pytest.raises(UserError, match="no such YAML"):
            find_file("Voc.yaml", [tmp_path / "models"], "YAML")


@pytest.mark.parametrize("name", ["", ".", "..", "x\0y", "a" * 300, "a/" * 100, "~nosuchuser/x.yaml", "x.[", "x.**", "*", "\ud800", "/", "\n"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(UserError, match="no such"):
        find_file(name, [tmp_path], "YAML")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="no such"):
        find_file(tmp_path, [], "YAML")


def test_nearest_names():
    assert did_you_mean("mosiac", ["mosaic", "mixup"]) == "; did you mean mosaic?"
    assert did_you_mean("VisDrone", ["visdrone2", "ds"]) == "; did you mean visdrone2?"
    assert did_you_mean("yolov5", ["yolov5s", "yolov5m", "yolov3"]).count(" or ") == 2
    assert did_you_mean("zzz", ["mosaic"]) == did_you_mean("", []) == did_you_mean(3, ["mosaic"]) == ""
    start = time.process_time()
    did_you_mean("a" * 100_000, [f"name{n}" for n in range(1000)])
    assert time.process_time() - start < 2


# YAML: what it refuses is in test_models_spec.py too


def test_yaml_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: \xc3\xa9t\xc3\xa9\nempty:\nrows: [[-1, 1, Conv, [64]], *r]\n".replace(b"*r", b"1.5e3"))
    assert read_yaml(path) == {"name": "été", "empty": None, "rows": [[-1, 1, "Conv", [64]], "1.5e3"]}
    path.write_text("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}, e: 2}\n")
    assert read_yaml(path) == {"a": [1, 2], "b": [1, 2], "c": {"d": 1, "e": 2}}
    assert read_yaml(path)["a"] == yaml.safe_load(path.read_text())["a"]


def test_many_names_are_no_bomb(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("names:\n" + "".join(f"  {n}: name{n}\n" for n in range(10_000)))
    start = time.process_time()
    assert len(read_yaml(path)["names"]) == 10_000
    assert time.process_time() - start < 10


@pytest.mark.parametrize(("text", "words"), [
    ("a: 1\nb: [1,\n", [":3:", "not valid YAML"]), ("a: 1\na: 2\n", [":2:", "'a' is there twice"]),
    ("x: {1: a, 1: b}\n", [":1:", "'1' is there twice"]),
    ("a: !!int x\n", [":1:", "'x' is no int"]), (f"a: {'9' * 30}\n", [":1:", "is no int"]), ("a: 2024-99-99\n", [":1:", "is no timestamp"]),
    ("a: !!python/object:os.x {}\n", [":1:", "python/object:os.x"]), ("a: *b\n", [":1:", "undefined alias"]), ("", ["found NoneType"]),
    ("[1]", ["found list"]),
    ("a: &a [*a]\n", [":1:", "alias"]), ("a: " + "[" * 60 + "]" * 60, [":1:", "deeper than 50"]), ("a: 1\x07", ["not valid YAML"]),
])  # fmt: skip
def test_yaml_refused(tmp_path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_yaml(path)
    assert str(raised.value).startswith(str(path)) and [word for word in words if word not in str(raised.value)] == [], raised.value


def test_what_json_escapes(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({"names": ["😀", "é"]}))
    assert read_yaml(path) == {"names": ["😀", "é"]}
    path.write_text(r'names: ["\ud83d"]')
    with pytest.raises(UserError, match=r"a\.yaml:1: not valid YAML: .* is no str"):
        read_yaml(path)


def test_what_is_no_text(tmp_path):
    path = tmp_path / "a.yaml"
    for content in (b"\xff\xfe", b"a: \xe9\n", os.urandom(64) + b"\xff", b"x" * (1 << 19)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.yaml"):
            read_yaml(path)
    with pytest.raises(UserError, match="can't be read"):
        read_yaml(tmp_path)
    with pytest.raises(UserError, match="can't be read"):
        read_yaml(tmp_path / "none.yaml")


def test_yaml_round_trip(tmp_path):
    content = {"b": [1, 2.5, None, True, "é", "no", "1e3"], "a": {"x": "None"}}
    write_yaml(tmp_path / "deep" / "a.yaml", content)
    assert read_yaml(tmp_path / "deep" / "a.yaml") == content and list(read_yaml(tmp_path / "deep" / "a.yaml")) == ["b", "a"]


# Writing


def test_a_write_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.pt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
        assert temporary.suffix == ".pt" and temporary.parent == path.parent and not path.exists()
    assert path.read_text() == "old"
    for error in (RuntimeError, KeyboardInterrupt, OSError(errno.ENOSPC, "full")):
        with pytest.raises(error if isinstance(error, type) else OSError), atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["x.pt"]
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass  # nothing was written: the old file stays
    assert path.read_text() == "old"


def test_a_name_as_long_as_a_disk_takes(tmp_path):
    for name in ("a" * 251 + ".txt", "я" * 125 + ".txt"):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_a_spreadsheet_is_whole_or_not_at_all(tmp_path):
    write_csv(tmp_path / "a.csv", ("name", "n"), iter([("é, ü", 1), ('"', "")]))
    assert (tmp_path / "a.csv").read_bytes() == 'name,n\n"é, ü",1\n"""",\n'.encode()
    with pytest.raises(ZeroDivisionError):
        write_csv(tmp_path / "a.csv", ("n",), ((1 / n,) for n in (1, 0)))
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").startswith("name") and [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_killed_while_writing(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    code = ("import os, signal\nfrom pathlib import Path\nfrom utils.files import atomic_write\n"
            f"with atomic_write(Path({str(path)!r})) as t:\n    t.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert path.read_text() == "old"


def test_a_folder_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a_model"
    with pytest.raises(ValueError), atomic_folder(path) as temporary:
        (temporary / "half").write_text("x")
        raise ValueError
    assert list(path.parent.iterdir()) == []
    for text in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / f"{text}.txt").write_text(text)
            assert not (path / f"{text}.txt").exists()
        assert [(p.name, p.read_text()) for p in path.rglob("*")] == [(f"{text}.txt", text)]
    with pytest.raises(ValueError), atomic_folder(path):
        raise ValueError
    assert [p.name for p in path.parent.rglob("*")] == ["a_model", "second.txt"]
    with pytest.raises(FileExistsError), atomic_folder(path / "second.txt"):
        pass
    assert (path / "second.txt").read_text() == "second"


def test_an_interrupt_between_two_renames_leaves_the_older_folder(tmp_path, monkeypatch):
    path = tmp_path / "a_model"
    path.mkdir()
    (path / "a.txt").write_text("old")
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        (temporary / "a.txt").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a_model"] and (path / "a.txt").read_text() == "old"


def test_leftovers_go_and_nothing_else(tmp_path):
    left = f".best_openvino_model.{'0' * 32}"
    (tmp_path / left).mkdir()
    (tmp_path / left / "best.xml").write_text("")
    for name in (f".best.{'a' * 32}.pt", "best.pt", ".hidden.pt"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden.pt", "best.pt"]


def test_run_folders_are_numbered(tmp_path):
    assert [new_run_dir(tmp_path, "exp").name for _ in range(3)] == ["exp", "exp2", "exp3"]
    assert new_run_dir(tmp_path, "exp", exist_ok=True).name == "exp"
    assert [new_run_dir(str(tmp_path / "a" / "b"), "c/d") for _ in range(2)] == [tmp_path / "a" / "b" / "c" / name for name in ("d", "d2")]
    (tmp_path / "file").write_text("")
    assert new_run_dir(tmp_path, "file").name == "file2"
    with pytest.raises(FileExistsError):
        new_run_dir(tmp_path / "file", "exp")
    with pytest.raises(FileExistsError):
        new_run_dir(tmp_path, "file", exist_ok=True)
    (tmp_path / "unmounted").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        new_run_dir(tmp_path / "unmounted", "exp")


def test_runs_at_once_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: new_run_dir(tmp_path, "exp"), range(24)))
    assert len(set(folders)) == 24


def test_is_writable(tmp_path):
    assert is_writable(tmp_path) and is_writable(tmp_path / "new" / "deep")
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut").chmod(0o555)
    assert not is_writable(tmp_path / "shut" / "new")
    (tmp_path / "shut").chmod(0o755)


# Errors


@pytest.mark.parametrize(("error", "words"), [
    (UserError("a.yaml: row 3:\n  mend it"), ["a.yaml: row 3: mend it"]), (UserError("\x1b[31mred\x07"), ["[31mred"]),
    (KeyboardInterrupt(), ["interrupted"]),
    (OSError(errno.ENOSPC, "No space left on device", "x/last.pt"), ["x/last.pt", "No space", "room"]),
    (PermissionError(errno.EACCES, "denied", "y"), ["y", "denied"]),
    (OSError(errno.ENAMETOOLONG, "File name too long", "z"), ["z", "too long"]), (MemoryError(), ["out of memory", "--batch-size"]),
    (RuntimeError("CUDA out of memory. Tried"), ["out of memory"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["out of memory"]),
    (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), ["out of memory"]),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), ["out of memory", "--workers"]),
    (OSError(errno.EMFILE, "Too many open files"), ["too many processes", "ulimit"]), (RuntimeError("can't start new thread"), ["--workers"]),
    (RuntimeError("Too many open files. Communication with the workers is no longer possible."), ["too many processes", "--workers"]),
    (ImportError("dlopen(a.dylib): Library not loaded: b.dylib", name="onnxruntime"), ["onnxruntime can't be loaded", "that library"]),
    (ImportError("libGL.so.1: cannot open shared object file", name="cv2"), ["cv2 can't be loaded: libGL.so.1", "opencv-python-headless"]),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(capsys, error, words):
    @script
    def main(argv=None):
        raise error

    assert main() == USER_ERROR == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err
    assert [word for word in words if word not in err] == [], err


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("x"), KeyError("x"), OSError(errno.EIO, "I/O error"), AssertionError(),
                                   ImportError("cannot import name 'a' from 'models.b' (/home/jane.sommer/models/b.py)")])
def test_our_own_mistakes_keep_their_traceback(error):
    @script
    def main(argv=None):
        raise error

    with pytest.raises(type(error)):
        main()


def test_an_endless_message_is_cut_in_its_middle():
    line = str(UserError("my.yaml: row 3: " + "x" * 10**6 + "; did you mean y?"))
    assert len(line) < 2100 and line.startswith("my.yaml: row 3: x") and line.endswith("; did you mean y?") and " … " in line


def test_a_script_answers_its_exit_code():
    assert script(lambda argv=None: 0)() == 0


def test_a_closed_pipe_is_no_error():
    code = "import sys\nfrom utils.errors import script\nsys.exit(script(lambda argv=None: [print(n) for n in range(10**6)] and 0)())"
    shell = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shell.stdout.readline()
    shell.stdout.close()
    assert shell.stderr.read() == b"" and shell.wait(timeout=60) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no locks there")
def test_one_process_at_a_time_writes_in_a_folder(tmp_path: Path):
    holds = ("import sys, time, pathlib, utils.files\nwith utils.files.only_writer(pathlib.Path(sys.argv[1])):\n"
             "    print('mine', flush=True)\n    time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", holds, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n" and has_writer(tmp_path)
        with pytest.raises(UserError, match="another process writes there now: wait for its end, or name another folder"), only_writer(tmp_path):
            pass
        other.kill()
    assert not has_writer(tmp_path)
    with only_writer(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)  # such as a loader's worker: it does not hold the folder on
            os._exit(0)
        assert has_writer(tmp_path)
    assert not has_writer(tmp_path)
    os.kill(child, 9)
    os.waitpid(child, 0)
