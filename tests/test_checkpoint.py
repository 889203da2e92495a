"""Our checkpoint: what is saved is loaded, by torch's safe loader too; a failed save changes nothing; refusals are one line."""
from __future__ import annotations

import math
import signal
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.checkpoint import FORMAT, VERSION, Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.unpickle import STORAGE_DTYPES

SPEC = {"nc": 2, "depth_multiple": 0.33, "anchors": [[10, 13]], "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[-1, 4], 1, "Concat", [1]]]}


def checkpoint(**changes) -> Checkpoint:
    parts = {"spec": SPEC, "names": ("cat", "dög"), "state_dict": {"model.0.weight": torch.arange(6.0).view(2, 3)}}
    return Checkpoint(**{**parts, **changes})


def round_trip(tmp_path: Path, **changes) -> Checkpoint:
    save_checkpoint(tmp_path / "a.pt", checkpoint(**changes))
    torch.load(tmp_path / "a.pt", weights_only=True)  # torch's own safe loader takes every file of ours
    return load_checkpoint(tmp_path / "a.pt")


def test_all_parts_come_back(tmp_path):
    optimizer = {"state": {0: {"momentum": torch.ones(3)}}, "groups": [{"lr": 0.01, "params": [0, 1]}]}
    training = {"epoch": 3, "optimizer": optimizer, "random": (3, (1, 2), None)}
    loaded = round_trip(tmp_path, metrics={"mAP": 0.5, "seen": 3}, imgsz=320, training=training)
    assert loaded.spec == SPEC
    assert loaded.names == ("cat", "dög")
    assert loaded.metrics == {"mAP": 0.5, "seen": 3.0}
    assert loaded.imgsz == 320
    assert loaded.state_dict["model.0.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded.training["random"] == (3, (1, 2), None)
    assert torch.equal(loaded.training["optimizer"]["state"][0].pop("momentum"), torch.ones(3))
    assert loaded.training["optimizer"]["groups"] == optimizer["groups"]


def test_the_least_checkpoint(tmp_path):
    loaded = round_trip(tmp_path, names=(), state_dict={}, spec={})
    assert (loaded.names, loaded.state_dict, loaded.spec, loaded.metrics, loaded.imgsz, loaded.training) == ((), {}, {}, {}, None, None)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES.values(), ids=str)
def test_every_dtype(tmp_path, dtype, shape):
    tensor = (torch.arange(math.prod(shape)).view(shape) * 37 % 128).to(dtype)
    save_checkpoint(tmp_path / "a.pt", checkpoint(state_dict={"x": tensor}))
    loaded = load_checkpoint(tmp_path / "a.pt").state_dict["x"]
    assert loaded.dtype == dtype
    assert loaded.shape == tensor.shape
    assert torch.equal(loaded, tensor)


def test_extreme_values(tmp_path):
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38])
    loaded = round_trip(tmp_path, state_dict={"x": values}, metrics={"nan": math.nan, "inf": math.inf})
    assert loaded.state_dict["x"].view(torch.int32).equal(values.view(torch.int32))
    assert math.isnan(loaded.metrics["nan"])
    assert loaded.metrics["inf"] == math.inf


def test_views_keep_their_values_and_leave_the_rest_behind(tmp_path):
    base = torch.arange(1_000_000.0)
    views = {"part": base[5:8], "turned": base[:6].view(2, 3).T, "last": torch.rand(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
             "conj": torch.tensor([1 + 2j]).conj(), "wide": torch.ones(1).expand(5), "grad": torch.nn.Parameter(torch.ones(2))}  # fmt: skip
    loaded = round_trip(tmp_path, state_dict=views).state_dict
    assert all(torch.equal(loaded[name], view) for name, view in views.items())
    assert not loaded["grad"].requires_grad
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_loaded_tensors_can_be_written(tmp_path):
    loaded = round_trip(tmp_path).state_dict["model.0.weight"]
    loaded += 1
    assert loaded[0, 0] == 1


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text("abc.é") | st.integers(-(2**60), 2**60), inner),
    max_leaves=15,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(training=st.dictionaries(st.text("abc"), plain))
def test_any_plain_data(tmp_path, training):
    save_checkpoint(tmp_path / "a.pt", checkpoint(training=training))
    assert repr(load_checkpoint(tmp_path / "a.pt").training) == repr(training)
    assert repr(torch.load(tmp_path / "a.pt", weights_only=True)["training"]) == repr(training)


@pytest.mark.parametrize(("value", "place"), [
    (np.float64(1), "training.a[1].b"), (np.zeros(2), "ndarray"), (Path("x"), "Path"), ({1, 2}, "set"), (b"raw", "bytes"), (object(), "object"),
    (torch.nn.ReLU(), "ReLU"), (torch.float32, "dtype"), (torch.Size([1]), "Size"), (OrderedDict(a=1), "OrderedDict"), (print, "builtin"),
    ({(1, 2): 3}, "keys"), ({1.5: 3}, "keys"), ({None: 3}, "keys"), ({2**64: 3}, "keys"), (2**63, "beyond 64 bits"),
    (torch.zeros(2, device="meta"), "meta"),
    (torch.zeros(2, 2).to_sparse(), "sparse"), (torch.zeros(2, dtype=torch.float8_e5m2), "float8"), (type("I", (int,), {})(3), "I"),
    ([0] * 200_000, "use tensors"), ("\ud800", "surrogates"),
])  # fmt: skip
def test_what_is_not_plain_is_not_written(tmp_path, value, place):
    with pytest.raises(ValueError, match=place.replace("[", r"\[")):
        save_checkpoint(tmp_path / "a.pt", checkpoint(training={"a": [0, {"b": value}]}))
    assert not list(tmp_path.iterdir())


def test_endless_and_ill_formed_trees_are_not_written(tmp_path):
    loop: list = []
    loop.append(loop)
    for changes in ({"training": {"a": loop}}, {"names": (1, 2)}, {"state_dict": {"a": 1}}, {"spec": None}, {"imgsz": 1.5}, {"imgsz": 10**9},
                    {"training": [1]}):
        with pytest.raises(ValueError, match="checkpoint: "):
            save_checkpoint(tmp_path / "a.pt", checkpoint(**changes))
    assert not list(tmp_path.iterdir())


def test_the_largest_tree_that_is_written_is_read(tmp_path):
    deep: list = []
    for _ in range(60):
        deep = [deep]
    loaded = round_trip(tmp_path, training={"wide": list(range(99_000)), "deep": deep})
    assert loaded.training["wide"][-1] == 98_999
    assert loaded.training["deep"] == deep


def test_equal_checkpoints_are_equal_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        save_checkpoint(tmp_path / name, checkpoint())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_failing_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint(imgsz=1))
    with pytest.raises(ValueError):
        save_checkpoint(path, checkpoint(imgsz=2, training={"a": object()}))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(5, "disk lost")))
    with pytest.raises(OSError, match="disk lost"):
        save_checkpoint(path, checkpoint(imgsz=3))
    monkeypatch.undo()
    assert load_checkpoint(path).imgsz == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file_whole(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint(imgsz=1))
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_checkpoint(path, checkpoint(imgsz=2, state_dict={"x": torch.rand(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_checkpoint(path).imgsz == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.pt"
    code = f"""
        import torch
        from utils.checkpoint import Checkpoint, save_checkpoint
        n = 0
        while True:
            n += 1
            save_checkpoint({str(path)!r}, Checkpoint({{}}, (), {{"x": torch.full((200_000,), float(n))}}, imgsz=n))
            print(n, flush=True)
    """
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=root, stdout=subprocess.PIPE)
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.wait()
    loaded = load_checkpoint(path)
    assert loaded.imgsz >= 5
    assert loaded.state_dict["x"].unique().tolist() == [loaded.imgsz]


def test_missing_file_lists_places_and_nearest_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yolov5n.pt").touch()
    with pytest.raises(UserError, match=r"yolov5m.pt: no such weights file.*looked at yolov5m.pt, .*; did you mean yolov5n.pt"):
        load_checkpoint("yolov5m.pt")
    with pytest.raises(UserError, match=r"looked at /nowhere/a.pt$"):
        load_checkpoint("/nowhere/a.pt")


def test_where_a_file_is_found(tmp_path, monkeypatch):
    """As typed, at home, or beside the project: the path that comes back holds from any folder that the typed one held from."""
    monkeypatch.setattr("utils.checkpoint.ROOT", tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("project", "home", "here"):
        save_checkpoint(tmp_path / folder / "a.pt", checkpoint())
    monkeypatch.chdir(tmp_path / "here")
    assert find_checkpoint("a.pt") == Path("a.pt") and find_checkpoint("~/a.pt") == tmp_path / "home" / "a.pt"
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("a.pt") == tmp_path / "project" / "a.pt"


def test_a_folder_names_the_file_in_it(tmp_path):
    with pytest.raises(UserError, match=r"is a folder; name the weights file in it$"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "weights" / "best.pt", checkpoint())
    with pytest.raises(UserError, match=r"such as .*best.pt$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(("changes", "says"), [
    ({"version": VERSION + 1}, "is of a newer format version, this program reads up to 1: update the program"),
    ({"version": 10**5000}, "a newer format version"),
    ({"version": "1"}, "an unknown format version"),
    ({"spec": None}, "its spec can't be understood"),
    ({"names": "cat"}, "its names can't be understood"),
    ({"names": [1]}, "its names can't be understood"),
    ({"state_dict": [torch.zeros(1)]}, "its state_dict can't be understood"),
    ({"state_dict": {"a": 1}, "metrics": {"a": "b"}}, "its state_dict and metrics can't be understood"),
    ({"imgsz": "640"}, "its imgsz can't be understood"),
    ({"training": 3}, "its training can't be understood"),
    ({"format": "other"}, "holds a dict of 'format', 'version', 'spec', 'names'"),
])  # fmt: skip
def test_other_contents_in_our_format(tmp_path, changes, says):
    whole = {"format": FORMAT, "version": VERSION, "spec": {}, "names": [], "state_dict": {}, "metrics": {}, "imgsz": None, "training": None}
    torch.save({**whole, **changes}, tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert says in str(caught.value)


def test_a_whole_model_of_torch(tmp_path):
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"holds a torch.nn.modules.conv.Conv2d, which carries no YOLOv5 YAML"):
        load_checkpoint(tmp_path / "a.pt")
