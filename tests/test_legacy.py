"""YOLOv5's pickled networks: what torch and pickle themselves make of them is what is read, without either."""
from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

YAML = {
    "nc": 80, "depth_multiple": 0.33, "width_multiple": 0.25, "anchors": 3, "ch": 3, "yaml_file": Path("yolov5n.yaml"),
    "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc", "anchors"]]],
}  # fmt: skip


@pytest.fixture
def family(monkeypatch):
    """Modules as YOLOv5's users have them pickled, under names that this project doesn't have."""
    module = types.ModuleType("yolov5.models.yolo")
    for name in ("yolov5", "yolov5.models", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)

    def define(name: str, base: type = nn.Module) -> type:
        cls = type(name, (base,), {"__module__": module.__name__})
        setattr(module, name, cls)
        return cls

    return types.SimpleNamespace(**{name: define(name) for name in ("Model", "Conv", "Detect")})


def build(family, activation: nn.Module | None = None, **attributes) -> nn.Module:
    torch.manual_seed(0)
    model, conv, detect = family.Model(), family.Conv(), family.Detect()
    conv.conv, conv.bn, conv.act = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), activation or nn.SiLU()
    detect.m = nn.ModuleList([nn.Conv2d(8, 14, 1)])
    detect.nc, detect.stride = 2, torch.tensor([8.0])
    detect.register_buffer("anchors", torch.tensor([[[1.25, 1.625], [2.0, 3.75]]]))
    detect.register_buffer("anchor_grid", torch.zeros(1, 1, 2, 1, 1, 2))
    detect.register_buffer("scratch", torch.zeros(3), persistent=False)
    model.model, model.yaml, model.names = nn.Sequential(conv, detect), dict(YAML), ["cat", "dog"]
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def expected(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if not key.endswith("anchor_grid")}


def save(tmp_path: Path, content) -> Path:
    torch.save(content, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def assert_equal(read: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> None:
    assert list(read) == list(oracle)
    for key, value in oracle.items():
        assert read[key].dtype == value.dtype, key
        assert torch.equal(read[key], value), key


def test_a_training_checkpoint(tmp_path, family):
    model = build(family).half()
    content = {"epoch": 3, "best_fitness": np.array([0.5]), "model": model, "ema": None, "date": "2022", "opt": {"save_dir": Path("runs")},
               "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}}  # fmt: skip
    read = load_checkpoint(save(tmp_path, content))
    assert_equal(read.state_dict, expected(model))
    assert read.names == ("cat", "dog")
    assert read.training is None
    kept = {key: YAML[key] for key in ("depth_multiple", "width_multiple", "backbone", "head")}
    assert read.spec == {**kept, "nc": 2, "anchors": [[10, 13, 16, 30]]}
    save_checkpoint(tmp_path / "new.pt", read)
    assert_equal(load_checkpoint(tmp_path / "new.pt").state_dict, expected(model))


def test_ema_comes_first_and_a_bare_or_wrapped_model_will_do(tmp_path, family):
    model, ema = build(family), build(family)
    ema.model[0].conv.weight.data += 1
    assert_equal(load_checkpoint(save(tmp_path, {"model": model, "ema": ema})).state_dict, expected(ema))
    assert_equal(load_checkpoint(save(tmp_path, model)).state_dict, expected(model))
    assert_equal(load_checkpoint(save(tmp_path, {"model": nn.DataParallel(model)})).state_dict, expected(model))


def test_strided_and_shared_weights(tmp_path, family):
    model = build(family).to(memory_format=torch.channels_last)
    model.model[0].conv.weight = nn.Parameter(model.model[0].conv.weight.detach().permute(1, 0, 2, 3))
    model.model[0].bn.bias = model.model[0].bn.weight
    assert_equal(load_checkpoint(save(tmp_path, {"model": model})).state_dict, expected(model))


@pytest.mark.parametrize(("names", "read"), [
    ({1: "b", 0: "a"}, ("a", "b")), ({"10": "b", "9": "a"}, ("a", "b")), (["a", "b"], ("a", "b")), (("a", "b"), ("a", "b")), ([1, 2.5], ("1", "2.5")),
    (None, ("0", "1")), ([], ("0", "1")),
])  # fmt: skip
def test_forms_of_names(tmp_path, family, names, read):
    assert load_checkpoint(save(tmp_path, {"model": build(family, names=names)})).names == read


@pytest.mark.parametrize(("activation", "text"), [
    (nn.SiLU(), None), (nn.Hardswish(), "nn.Hardswish()"), (nn.LeakyReLU(0.1), "nn.LeakyReLU(0.1)"), (nn.Identity(), None),
])  # fmt: skip
def test_the_activation_of_old_versions(tmp_path, family, activation, text):
    assert load_checkpoint(save(tmp_path, {"model": build(family, activation)})).spec.get("activation") == text
    named = {**YAML, "activation": "nn.ReLU()"}
    assert load_checkpoint(save(tmp_path, {"model": build(family, activation, yaml=named)})).spec["activation"] == "nn.ReLU()"


@pytest.mark.parametrize(("module", "head", "says"), [
    ("ultralytics.nn.tasks", "Detect", r"holds an ultralytics DetectionModel; only networks with anchors, of YOLOv5 itself"),
    ("yolov5.models.yolo", "Segment", "ends in Segment, not in Detect: only detectors are read"),
])  # fmt: skip
def test_networks_of_another_kind(tmp_path, monkeypatch, family, module, head, says):
    place = sys.modules[family.Model.__module__]
    for package in ("ultralytics", "ultralytics.nn", module):
        monkeypatch.setitem(sys.modules, package, place)
    for name in ("DetectionModel", head):
        monkeypatch.setattr(place, name, type(name, (nn.Module,), {"__module__": module}), raising=False)
    model = build(types.SimpleNamespace(Model=place.DetectionModel, Conv=family.Conv, Detect=getattr(place, head)))
    with pytest.raises(UserError, match=says):
        load_checkpoint(save(tmp_path, {"model": model}))


def test_a_network_that_was_saved_fused(tmp_path, family):
    model = build(family)
    conv = model.model[0]
    conv.conv = nn.Conv2d(3, 8, 3)
    del conv.bn
    read = load_checkpoint(save(tmp_path, {"model": model}))
    assert read.spec["fused"] is True and "fused" not in load_checkpoint(save(tmp_path, {"model": build(family)})).spec
    assert_equal(read.state_dict, expected(model))


def test_anchors_of_the_yaml_where_the_head_has_none(tmp_path, family):
    model = build(family)
    model.model[1].stride = None
    assert load_checkpoint(save(tmp_path, {"model": model})).spec["anchors"] == 3


@pytest.mark.parametrize(("attributes", "says"), [
    ({"names": ["cat"]}, "has 1 class names for a head of 2 classes"),
    ({"names": "cat"}, "its class names are neither a list nor a dict of text"),
    ({"names": [nn.ReLU()] * 2}, "holds torch.nn.modules.activation.ReLU"),
    ({"yaml": None}, "holds a yolov5.models.yolo.Model, which carries no YOLOv5 YAML"),
    ({"yaml": {**YAML, "head": [Path("x")]}}, "Path where plain data is expected"),
    ({"model": None}, "carries no YOLOv5 YAML"),
])  # fmt: skip
def test_networks_that_contradict_themselves(tmp_path, family, attributes, says):
    with pytest.raises(UserError, match=says):
        load_checkpoint(save(tmp_path, {"model": build(family, **attributes)}))


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"model": weights}, lambda weights: {"state_dict": weights, "epoch": 1}])
def test_a_bare_state_dict_has_no_architecture(tmp_path, wrap):
    with pytest.raises(UserError, match="is a bare state_dict: tensors without the network's YAML, names and anchors; expected"):
        load_checkpoint(save(tmp_path, wrap(nn.Conv2d(1, 1, 1).state_dict())))


@pytest.mark.parametrize(("content", "says"), [
    ({"model": None}, "holds a dict of 'model'"), ({}, "holds a dict"), ([1], "holds a value of type list"), (torch.zeros(2), "holds a bare tensor"),
    (3, "holds a value of type int"), ({"a\nb": 1}, r"holds a dict of 'a\\nb'"),
])  # fmt: skip
def test_files_of_torch_without_a_network(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        load_checkpoint(save(tmp_path, content))


def test_a_parameter_that_is_no_tensor(tmp_path, family):
    model = build(family)
    model.model[0].conv._parameters["weight"] = Path("x")
    with pytest.raises(UserError, match=r"its model.0.conv.weight is no tensor"):
        load_checkpoint(save(tmp_path, {"model": model}))


class _TorchUnpickler(pickle.Unpickler):
    """The other reading: Python's pickle with torch's classes, and an empty Module for each of the family's."""

    def __init__(self, bundle: zipfile.ZipFile) -> None:
        super().__init__(io.BytesIO(bundle.read("archive/data.pkl")), encoding="utf-8")
        self.bundle = bundle

    def find_class(self, module: str, name: str):
        return type(name, (nn.Module,), {}) if module.startswith("models.") else super().find_class(module, name)

    def persistent_load(self, identity):
        _, storage_type, key, _, _ = identity
        untyped = torch.frombuffer(bytearray(self.bundle.read(f"archive/data/{key}")), dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=storage_type.dtype, _internal=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TypedStorage is deprecated")
def test_published_weights_equal_torchs_own_reading(shared):
    path = shared / "weights" / "yolov5n.pt"
    read = load_checkpoint(path)
    with zipfile.ZipFile(path) as bundle:
        model = _TorchUnpickler(bundle).load()["model"]
    assert_equal(read.state_dict, expected(model))
    assert read.names == tuple(model.names)
    assert {key: value for key, value in model.yaml.items() if key != "ch"} == read.spec
    counted = [value for key, value in read.state_dict.items() if key.endswith((".weight", ".bias"))]
    assert sum(value.numel() for value in counted) == 1_872_157
    assert read.state_dict["model.0.conv.weight"].shape == (16, 3, 6, 6)
    assert (read.state_dict["model.24.anchors"][0] * 8).tolist() == [[10, 13], [16, 30], [33, 23]]
