"""Backbones of timm and torchvision as rows: their own levels, whatever the image's size; weights from files; every mistake named by its row."""
from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.backbones import Level
from models.prune import channel_graph, remove_channels
from models.registry import find_block
from models.spec import ModelSpec
from models.summary import count_gflops
from models.timm_backbone import Timm
from models.torchvision_backbone import Torchvision
from models.yolo import DetectionModel, build_for_training, load_model
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import ROOT, write_yaml

SWIN = "swin_tiny_patch4_window7_224"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
TIMM = [-1, 1, "Timm", ["lcnet_050"]]
LEVELS = tuple([0, 1, "Level", [i]] for i in range(3))


def content(*rows: Any, levels: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """A YAML of these rows, with Detect on `levels`."""
    return {"nc": 2, "anchors": 3, "backbone": [list(row) for row in rows], "head": [[list(levels), 1, "Detect", ["nc", "anchors"]]]}


def network(*args: Any, module: str = "Timm") -> DetectionModel:
    return DetectionModel(ModelSpec.from_dict(content([-1, 1, module, list(args)], *LEVELS), "net.yaml"))


def message(*rows: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        DetectionModel(ModelSpec.from_dict(content(*rows, **options), "net.yaml"))
    assert "\n" not in str(error.value)
    return str(error.value)


def saved(weights: dict[str, Tensor], path: Path) -> str:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({key: value.contiguous() for key, value in weights.items()}, path)
    return str(path)


def alive(net: nn.Module) -> nn.Module:
    """Eval mode, with batch norms' constants as after a training."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.7, 1.4, generator=generator)
    return net.eval()


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


# Levels


@pytest.mark.parametrize(("name", "out"), [
    ("resnet18", [2, 3, 4]), ("mobilenetv4_conv_small", [0, 2, 4]), (SWIN, [1, 2, 4]), ("convnext_atto", [2, 3]), ("repvgg_a0", [1, 4]),
])  # fmt: skip
@torch.no_grad()
def test_timms_levels_are_those_of_its_whole_network(name, out, tmp_path):
    """With the whole classifier's weights, read from a file."""
    whole = alive(timm.create_model(name, **{"always_partition": True} if name == SWIN else {}))  # as at a detector's sizes: more than one window
    backbone = Timm(name, out, saved(whole.state_dict(), tmp_path / "w.safetensors")).eval()
    backbone.load_pretrained()
    images = torch.rand(1, 3, 224, 224)
    wanted = {224 // x.shape[2]: x for x in whole.forward_intermediates((images - MEAN) / STD, intermediates_only=True)}
    wanted = [wanted[2 ** (i + 1)] for i in out]
    levels = backbone(images)
    assert isinstance(levels, tuple) and backbone.out_channels == tuple(x.shape[1] for x in wanted)
    assert_same(levels, wanted)


@pytest.mark.parametrize(("name", "places"), [
    ("resnet18", {1: "layer1", 2: "layer2", 3: "layer3", 4: "layer4"}), ("mobilenet_v3_small", {0: "features.0", 2: "features.3", 4: "features.12"}),
    ("shufflenet_v2_x0_5", {2: "stage2", 3: "stage3", 4: "conv5"}), ("regnet_y_400mf", {2: "trunk_output.block2", 4: "trunk_output.block4"}),
    ("swin_t", {2: "features.3", 4: "permute"}),
])  # fmt: skip
@torch.no_grad()
def test_torchvisions_levels_are_those_of_its_blocks(name, places, tmp_path):
    whole = alive(torchvision.models.get_model(name))
    backbone = Torchvision(name, list(places), saved(whole.state_dict(), tmp_path / "w.pth")).eval()
    backbone.load_pretrained()
    wanted = {}
    for level, place in places.items():
        whole.get_submodule(place).register_forward_hook(lambda _, inputs, output, level=level: wanted.update({level: output.clone()}))
    images = torch.rand(2, 3, 64, 96)
    whole((images - MEAN) / STD)
    if name == "swin_t":
        wanted[2] = wanted[2].permute(0, 3, 1, 2)
    levels = backbone(images)
    assert backbone.out_channels == tuple(wanted[level].shape[1] for level in places)
    assert_same(levels, [wanted[level] for level in places])


def test_densenets_files_are_older_than_its_names(tmp_path, capsys):
    whole = alive(torchvision.models.densenet121())
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", key): value for key, value in whole.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    backbone = Torchvision("densenet121", [4], saved(old, tmp_path / "w.pth"))
    backbone.load_pretrained()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in backbone.net.state_dict().items())


def test_weights_that_do_not_fit_are_told(monkeypatch):
    backbone = Torchvision("resnet18", [4], True)
    monkeypatch.setattr(backbone, "_fetch", lambda: {})
    with pytest.raises(UserError, match=r"the weights that were fetched: not those of this resnet18: .*Missing key"):
        backbone.load_pretrained()


def test_googlenet_sees_images_as_its_weights_do():
    backbone = Torchvision("googlenet", [3], True)
    assert backbone.mean.flatten().tolist() == backbone.std.flatten().tolist() == [0.5, 0.5, 0.5]


def test_swin_shifts_the_windows_of_every_stage():
    blocks = {name: block for name, block in Timm(SWIN, [4]).net.named_modules() if name.endswith("blocks.1")}
    assert len(blocks) == 4 and all(tuple(block.shift_size) == (3, 3) for block in blocks.values())


def test_a_network_with_another_recipe_is_given_images_by_that():
    assert Timm("lcnet_050", [1]).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert Timm("tf_mobilenetv3_small_minimal_100", [1]).std.flatten().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("module", ["Timm", "Torchvision"])
def test_a_detector_of_it(module):
    model = network("resnet18", {"out": [2, 3, 4]}, module=module).eval()
    assert model.strides == (8, 16, 32)
    maps = (128, 32, 32), (256, 16, 16), (512, 8, 8)
    assert model.row_shapes == [maps, *maps]
    with torch.no_grad():
        for height, width in ((320, 320), (416, 256)):
            shapes = [tuple(x.shape) for x in model(torch.rand(1, 3, height, width))]
            assert shapes == [(1, 3, height // s, width // s, 7) for s in (8, 16, 32)]


@pytest.mark.parametrize("name", [SWIN, "vit_tiny_patch16_224"])
@torch.no_grad()
def test_windows_and_tokens_take_any_size(name):
    backbone = Timm(name, [3]).eval()
    for height, width in ((64, 64), (320, 320), (416, 256)):
        assert backbone(torch.rand(1, 3, height, width))[0].shape[2:] == (height // 16, width // 16)


def test_one_level_is_a_level_too():
    model = DetectionModel(ModelSpec.from_dict(content([-1, 1, "Timm", ["lcnet_050", {"out": [3]}]], [0, 1, "Level", [0]], levels=(1,)), "net.yaml"))
    assert model.strides == (16,) and model.row_shapes == [((128, 16, 16),), (128, 16, 16)]


def test_its_own_norms_and_activations_stay():
    rows = content(TIMM, *LEVELS, [3, 1, "Conv", [8]], levels=(1, 2, 4))
    model = DetectionModel(ModelSpec.from_dict(rows | {"activation": "nn.ReLU()"}, "net.yaml"))
    assert {(m.eps, m.momentum) for m in model.model[0].modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-5, 0.1)}
    assert any(isinstance(m, nn.Hardswish) for m in model.model[0].modules())
    assert isinstance(model.model[4].act, nn.ReLU) and model.model[4].bn.eps == 1e-3


@pytest.mark.parametrize(("name", "module"), [("lcnet_050", "Timm"), ("mobilenet_v3_small", "Torchvision")])
def test_every_parameter_trains(name, module):
    model = network(name, module=module)
    sum(x.square().sum() for x in model(torch.rand(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "module"), [("lcnet_050", "Timm"), ("mobilenet_v3_small", "Torchvision")])
@torch.no_grad()
def test_a_checkpoint_brings_it_back(name, module, tmp_path):
    """Without its pretrained weights: their file may be gone."""
    model = alive(network(name, {"pretrained": "gone.safetensors"}, module=module))
    path = tmp_path / "best.pt"
    save_checkpoint(path, Checkpoint(model.spec.to_dict(), model.names, model.state_dict()))
    again = load_model(str(path))
    assert list(again.state_dict()) == list(model.state_dict())
    assert {key.split(".")[2] for key in model.state_dict() if key.startswith("model.0.")} == {"net", "mean", "std"}
    images = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model(images), again(images), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model(images), copy.deepcopy(model)(images), strict=True))


@pytest.mark.parametrize("name", ["tf_mobilenetv3_small_minimal_100", "lcnet_050", SWIN])
@torch.no_grad()
def test_work_of_derived_layers_and_attention_is_counted(name):
    """Classes derived from PyTorch's, and products that are no layer's, by PyTorch's own counter of operations."""
    backbone = Timm(name).eval()
    norms = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal norms
        norms += 4 * output.numel()

    hooks = [m.register_forward_hook(count) for m in backbone.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    assert count_gflops(backbone, 64) * 1e9 == pytest.approx(counter.get_total_flops() + 2 * norms, rel=5e-3)


def test_the_example_of_the_docs():
    page = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    rows = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    model = DetectionModel(ModelSpec.from_dict(rows, "docs/backbones.md", 2))
    assert model.strides == (16, 32) and model.spec.layers[0].args == ("mobilenetv4_conv_small",)


# Mistakes


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert message([-1, 1, "Timm", ["resnet18"]], *LEVELS) == "net.yaml: row 0 (backbone 0) Timm: needs timm: pip install timm"


@pytest.mark.parametrize(("args", "words"), [
    (["resnet81"], "timm has no network resnet81; did you mean resnet18"), ([18], "timm has no network 18"),
    (["hf-hub:timm/resnet18"], "timm has no network hf-hub"), (["resnet18.nosuch"], "nosuch"),
    ([SWIN, {"out": [0, 1]}], f"{SWIN} has no level 0 (stride 2); its levels are 1 (stride 4), 2 (stride 8), 3 (stride 16), 4 (stride 32)"),
    (["resnet18", {"out": [3, 2]}], "out: [3, 2] must be rising"), (["resnet18", {"out": 3}], "out: 3 must be"),
    (["resnet18", {"out": [10**9]}], "must be rising level numbers from 0 to 5"), (["resnet18", {"pretrained": 1}], "pretrained: 1 must be"),
    (["coat_tiny"], "takes images of one size only"), (["sebotnet33ts_256"], "takes images of one size only"), ([], "name"),
])  # fmt: skip
def test_mistakes_in_timms_row(args, words):
    line = message([-1, 1, "Timm", args], *LEVELS)
    assert line.startswith("net.yaml: row 0 (backbone 0) Timm: ") and words in line


@pytest.mark.parametrize(("args", "words"), [
    (["resnet81"], "torchvision has no classifier resnet81; did you mean resnet18"), ([["resnet18"]], "has no classifier"),
    (["fasterrcnn_resnet50_fpn"], "has no classifier"), (["vit_b_16"], "can't be cut into levels"),
    (["alexnet"], "has no level 2 (stride 8); its levels are none"), (["resnet18", {"out": [5]}], "has no level 5 (stride 64)"),
])  # fmt: skip
def test_mistakes_in_torchvisions_row(args, words):
    line = message([-1, 1, "Torchvision", args], *LEVELS)
    assert line.startswith("net.yaml: row 0 (backbone 0) Torchvision: ") and words in line


@pytest.mark.parametrize(("rows", "line"), [
    ((TIMM, [0, 1, "Conv", [8]]), "row 1 (backbone 1) Conv: row 0 gives 3 levels; pick one with [0, 1, Level, [0]]"),
    ((TIMM, LEVELS[0], [[1, 0], 1, "Concat", [1]]), "row 2 (backbone 2) Concat: row 0 gives 3 levels"),
    ((TIMM, [0, 1, "Level", [3]]), "row 1 (backbone 1) Level: [3] does not fit: needs the number of one of the 3 levels that its row gives, 0 to 2"),
    ((TIMM, [0, 1, "Level", [-1]]), "0 to 2"), ((TIMM, [0, 1, "Level", []]), "0 to 2"), ((TIMM, [0, 2, "Level", [0]]), "picks a level of one row"),
    ((TIMM, LEVELS[0], [1, 1, "Level", [0]]), "row 2 (backbone 2) Level: [0] does not fit: picks a level of one row that makes several"),
    (([-1, 1, "Conv", [8]], TIMM), "row 1 (backbone 1) Timm: ['lcnet_050'] does not fit: takes the image itself"),
    (([-1, 2, "Timm", ["lcnet_050"]], LEVELS[0]), "row 0 (backbone 0) Timm: ['lcnet_050'] does not fit: takes the image itself"),
])  # fmt: skip
def test_levels_and_maps_are_not_confused(rows, line):
    assert line in message(*rows, levels=(1,))


def test_detect_takes_no_levels():
    assert "Detect: row 0 gives 3 levels" in message(TIMM, levels=(0,))


class Torn(nn.Module):
    out_channels = 8, 8

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(("make", "words"), [
    (lambda x: [x, x], "makes a list, not a tuple of 2 tensors"), (lambda x: (x,), "makes a tuple, not a tuple of 2 tensors"),
    (lambda x: (x, x), "makes a tensor of shape (1, 3, 256, 256), not (batch, 8, height, width)"),
])  # fmt: skip
def test_a_users_block_of_levels_is_held_to_them(make, words, monkeypatch):
    block = find_block("Timm")
    monkeypatch.setattr(Torn, "make", staticmethod(make), raising=False)
    monkeypatch.setitem(sys.modules["models.registry"]._BLOCKS, "Torn", type(block)("Torn", Torn, block.channels, "outside", False, True))
    assert words in message([-1, 1, "Torn", []], *LEVELS)


def test_level():
    assert Level(1)(("a", "b", "c")) == "b"


# Pretrained weights


@pytest.fixture
def trained(tmp_path) -> dict[str, Tensor]:
    weights = alive(timm.create_model("lcnet_050", num_classes=7)).state_dict()
    saved(weights, tmp_path / "w.safetensors")
    return weights


def start(tmp_path: Path, pretrained: bool | str, name: str = "lcnet_050", module: str = "Timm", weights: str = "") -> DetectionModel:
    """As a training starts."""
    write_yaml(tmp_path / "net.yaml", content([-1, 1, module, [name, {"pretrained": pretrained}]], *LEVELS))
    return build_for_training(str(tmp_path / "net.yaml"), weights, ("a", "b"))[0]


def test_a_training_starts_from_the_file(trained, tmp_path, monkeypatch, capsys):
    """Found from the working folder; the classifier may be of any size."""
    monkeypatch.chdir(tmp_path)
    own = start(tmp_path, "w.safetensors").model[0].net.state_dict()
    assert len(own) > 50 and all(torch.equal(value, trained[key]) for key, value in own.items())
    assert "lcnet_050: pretrained weights read from w.safetensors" in capsys.readouterr().out
    assert not torch.equal(start(tmp_path, False).model[0].net.state_dict()["conv_stem.weight"], trained["conv_stem.weight"])


def test_a_pruned_backbone_starts_from_random_weights(trained, tmp_path, capsys):
    """Those of its whole width don't fit it."""
    model = network("lcnet_050", {"pretrained": str(tmp_path / "w.safetensors")}).eval()
    graph = channel_graph(model)
    group = max((group for group in graph.groups if group.name.startswith("model.0.")), key=lambda group: len(group.channels))
    left = remove_channels(model, graph, graph.keep({group.name: np.arange(len(group.channels)) % 2 == 0}))
    (tmp_path / "pruned.yaml").write_text(left.spec.to_yaml())
    again, _ = build_for_training(str(tmp_path / "pruned.yaml"), "", ("a", "b"))
    assert [p.shape for p in again.parameters()] == [p.shape for p in left.parameters()]
    said = capsys.readouterr().out
    assert "row 0 (backbone 0) Timm: starts from random weights: pretrained ones are for its whole width" in said and "read from" not in said


def test_weights_that_are_named_come_after_the_file(trained, tmp_path):
    other = network("lcnet_050")
    save_checkpoint(tmp_path / "best.pt", Checkpoint(other.spec.to_dict(), other.names, other.state_dict()))
    model = start(tmp_path, str(tmp_path / "w.safetensors"), weights=str(tmp_path / "best.pt"))
    assert torch.equal(model.model[0].net.conv_stem.weight, other.model[0].net.conv_stem.weight)
    assert start(tmp_path, "gone.safetensors", weights=str(tmp_path / "best.pt")).model[0].pretrained == "gone.safetensors"  # not looked for


def test_only_a_training_from_a_yaml_looks_for_the_file(tmp_path):
    network("lcnet_050", {"pretrained": "gone.safetensors"})
    with pytest.raises(UserError, match=r"row 0 \(backbone 0\) Timm: gone.safetensors: no such weights file"):
        start(tmp_path, "gone.safetensors")
    other = network("lcnet_050", {"pretrained": "gone.safetensors"})
    save_checkpoint(tmp_path / "best.pt", Checkpoint(other.spec.to_dict(), other.names, other.state_dict()))
    build_for_training("", str(tmp_path / "best.pt"), ("a", "b", "c"))


@pytest.mark.parametrize(("change", "words"), [
    (lambda w: w.pop("blocks.0.0.conv_dw.weight"), "are not those of lcnet_050: 1 missing, first blocks.0.0.conv_dw.weight"),
    (lambda w: w.update(conv_stem=torch.zeros(1)), "1 unknown, first conv_stem"),
    (lambda w: w.update({"conv_stem.weight": torch.zeros(8, 3, 5, 5)}), "1 of another shape, first conv_stem.weight (8, 3, 5, 5), not (8, 3, 3, 3)"),
    (lambda w: w.clear(), "missing"),
])  # fmt: skip
def test_a_file_of_another_network(trained, change, words, tmp_path):
    change(trained)
    path = saved(trained, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        start(tmp_path, path)
    assert str(error.value).startswith(f"net.yaml: row 0 (backbone 0) Timm: {path}: its tensors") and words in str(error.value)


def test_a_file_without_counters_and_classifier(trained, tmp_path):
    """As older programs wrote them, and as backbones alone are saved."""
    kept = {key: value for key, value in trained.items() if not key.endswith("num_batches_tracked") and not key.startswith("classifier")}
    model = start(tmp_path, saved(kept, tmp_path / "old.pt"))
    assert torch.equal(model.model[0].net.conv_stem.weight, kept["conv_stem.weight"])
    weights = torchvision.models.get_model("shufflenet_v2_x0_5").state_dict()
    kept = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked") and not key.startswith("fc")}
    model = start(tmp_path, saved(kept, tmp_path / "old.pth"), "shufflenet_v2_x0_5", "Torchvision")
    assert torch.equal(model.model[0].net.state_dict()["conv5.0.weight"], weights["conv5.0.weight"])


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_file_of_no_weights(name, tmp_path):
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=r"can't be read as weights"):
        start(tmp_path, str(tmp_path / name))
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="is no state dict"):
        start(tmp_path, str(tmp_path / "w.pth"))


def no_network(*args: Any, **kwargs: Any) -> None:
    raise ConnectionError("no route to host\nand more")


def test_offline_timm(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    with pytest.raises(UserError) as error:
        start(tmp_path, True)
    line = str(error.value)
    assert line.startswith("net.yaml: row 0 (backbone 0) Timm: the weights of timm's lcnet_050 can't be fetched (ConnectionError: no route to host)")
    assert "timm.create_model('lcnet_050', pretrained=True)" in line and line.endswith("give the file as pretrained: lcnet_050.safetensors")


def test_offline_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(UserError) as error:
        start(tmp_path, True, "mobilenet_v3_small", "Torchvision")
    line = str(error.value)
    assert "the weights of torchvision's mobilenet_v3_small can't be fetched (ConnectionError: no route to host)" in line
    assert "https://download.pytorch.org/models/mobilenet_v3_small-" in line and "pretrained: mobilenet_v3_small-" in line


def test_online_timm(trained, tmp_path, monkeypatch):
    """What timm fetches is what the network starts from."""
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: timm.create_model("lcnet_050").state_dict() | {
        key: value for key, value in trained.items() if not key.startswith("classifier")})
    assert torch.equal(start(tmp_path, True).model[0].net.conv_stem.weight, trained["conv_stem.weight"])


def test_online_torchvision(tmp_path, monkeypatch):
    weights = torchvision.models.get_model("shufflenet_v2_x0_5").state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: weights)
    own = start(tmp_path, True, "shufflenet_v2_x0_5", "Torchvision").model[0].net.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in own.items())
