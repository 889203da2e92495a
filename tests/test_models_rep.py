"""RepVGG and RepGhost against timm's networks, in the rows of our YAMLs; and their branches folded into one convolution."""
from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from transplant import assert_same, assert_same_stages, assert_trains, backbone, images, lived_in, norms, parameters

from models.layers import SlicedConv2d, slice_strided
from models.prune import channel_graph, remove_channels
from models.rep import RepGhostBneck, RepGhostModule, RepVGGBlock, merge_branches
from models.spec import load_spec
from models.summary import count_gflops
from models.yolo import DetectionModel
from utils.compress.importance import l1
from utils.compress.plan import Limits, best_of, uniform

YAMLS = Path(__file__).resolve().parents[1] / "models"
MERGED = re.compile(r"^# Trained with parallel branches; run with one convolution it has ([\d,]+) parameters and ([\d.]+) GFLOPs\.$", re.MULTILINE)


def folded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    return model


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def test_timms_weights_give_timms_stages_of_repvgg():
    timm = pytest.importorskip("timm", reason="the oracle: pip install timm")
    torch.manual_seed(0)
    net = lived_in(timm.create_model("repvgg_a0", pretrained=False))
    blocks = backbone("yolov5s-repvgg-a0.yaml")
    assert parameters(*blocks) == parameters(net) - parameters(net.head)
    assert parameters(net) == 9_108_968  # of the published classifier
    y = assert_same_stages(blocks, [net.stem, *(block for stage in net.stages for block in stage)], stems=0)
    merged = folded(nn.Sequential(*blocks))
    assert parameters(merged) + parameters(net.head) == 8_309_384  # 8.30 M in the paper's table 4
    assert_same(run(merged, images()), y)


def test_timms_weights_give_timms_stages_of_repghost():
    timm = pytest.importorskip("timm", reason="the oracle: pip install timm")
    torch.manual_seed(0)
    net = lived_in(timm.create_model("repghostnet_100", pretrained=False))
    stem, head = nn.Sequential(net.conv_stem, net.bn1, net.act1), (net.blocks[-1], net.conv_head, net.classifier)
    blocks = backbone("yolov5s-repghost.yaml")
    assert parameters(*blocks) + parameters(*head) == parameters(net) == 4_073_604  # 4.1 M in the paper
    y = assert_same_stages(blocks, [stem, *(block for stage in net.blocks[:-1] for block in stage)])
    merged = folded(nn.Sequential(*blocks))
    net.convert_to_deploy()
    assert parameters(merged) + parameters(*head) == parameters(net) == 4_058_772
    assert_same(run(merged, images()), y)


# Each with the layers that are left of it.
CASES = {
    "vgg, three branches": (lambda: RepVGGBlock(8, 8), "Conv2d ReLU"),
    "vgg, two branches": (lambda: RepVGGBlock(8, 12), "Conv2d ReLU"),
    "vgg, strided": (lambda: RepVGGBlock(8, 8, 2), "Conv2d ReLU"),
    "ghost": (lambda: RepGhostModule(8, 8), "Conv2d BatchNorm2d ReLU Conv2d ReLU"),
    "ghost, strided, 5x5": (lambda: RepGhostModule(8, 12, 3, 2, False, 5), "Conv2d BatchNorm2d Conv2d Identity"),
}
EVERY_CASE = pytest.mark.parametrize("make, left", CASES.values(), ids=CASES)


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_keeps_the_outputs(make, left, dtype):
    torch.manual_seed(0)
    block = lived_in(make()).to(dtype)
    x = torch.randn(2, 8, 9, 6, dtype=dtype)
    before, state = run(block, x), torch.get_rng_state()
    merged = folded(block)
    assert_same(run(merged, x), before)
    assert run(merged, x).dtype == dtype and torch.equal(state, torch.get_rng_state())
    assert parameters(merged) < parameters(block)
    assert not any(p.data_ptr() in {q.data_ptr() for q in block.parameters()} for p in merged.parameters())


@EVERY_CASE
def test_one_convolution_is_left_in_place_of_the_branches(make, left):
    leaves = [type(module).__name__ for module in folded(make()).modules() if not any(module.children())]
    assert leaves == left.split()


@EVERY_CASE
def test_folding_again_does_nothing(make, left):
    merged = folded(make())
    state = {key: value.clone() for key, value in merged.state_dict().items()}
    merged.reparameterize()
    assert all(torch.equal(value, state[key]) for key, value in merged.state_dict().items()) and len(state) == len(merged.state_dict())


def test_branches_by_hand():
    """A 3x3 of ones, a 1x1 of 2, the input itself; batch norms that scale by 1, 3 and 5 and add 0, 1 and 0."""
    wide, narrow = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(wide.weight)
    nn.init.constant_(narrow.weight, 2)
    scales = [nn.BatchNorm2d(1, eps=0) for _ in range(3)]
    for norm, scale, shift in zip(scales, (1, 3, 5), (0, 1, 0), strict=True):
        nn.init.constant_(norm.weight, scale)
        nn.init.constant_(norm.bias, shift)
    merged = merge_branches(wide, zip((wide, narrow, None), scales, strict=True))
    assert merged.weight.flatten().tolist() == [1, 1, 1, 1, 1 + 6 + 5, 1, 1, 1, 1]
    assert merged.bias.tolist() == [1] and wide.bias is None


@pytest.mark.parametrize("name", ["yolov5s-repvgg-a0", "yolov5s-repghost"])
def test_merged_size_is_in_the_header(name):
    model = folded(DetectionModel(load_spec(f"{name}.yaml")))
    found = MERGED.findall((YAMLS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert found == [(f"{parameters(model):,}", f"{count_gflops(model):.1f}")]


@pytest.mark.parametrize("block", [lambda: RepVGGBlock(8, 8), lambda: RepVGGBlock(8, 12, 2), lambda: RepGhostBneck(8, 8, 3, 16),
                                   lambda: RepGhostBneck(8, 12, 5, 16, 0.25, 2)])  # fmt: skip
def test_gradients_flow(block):
    torch.manual_seed(0)
    assert_trains(lived_in(block()), torch.randn(2, 8, 8, 6))


def test_what_is_narrowed_is_sliced_too(tmp_path):
    """A strided 1x1 convolution that has channels enough before pruning, and too few for oneDNN's gradient afterwards."""
    rows = [[-1, 1, "RepVGGBlock", [32, 2]] for _ in range(5)]
    content = {"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3, "backbone": rows, "head": [[[4], 1, "Detect", ["nc", "anchors"]]]}
    (tmp_path / "rep.yaml").write_text(yaml.safe_dump(content))
    model = DetectionModel(load_spec(str(tmp_path / "rep.yaml"), 2), ("a", "b")).eval()
    graph = channel_graph(model)
    assert type(model.model[1].conv_1x1.conv) is nn.Conv2d
    left = remove_channels(model, graph, best_of(graph, uniform(graph, Limits(0.1, 1))(0.2), l1(graph, model.state_dict())))
    sliced = [row.conv_1x1.conv for row in left.model[1:-1]]
    assert all(type(conv) is SlicedConv2d and conv.in_channels < 16 for conv in sliced)
    images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    sum(raw.square().sum() for raw in left.train()(images)).backward()


def test_gradients_of_an_image_with_channels_last():
    """As the network has the block: its strided 1x1 convolution sliced, without which channels last would end the process here."""
    torch.manual_seed(0)
    block, x = lived_in(RepVGGBlock(3, 16, 2)), torch.randn(2, 3, 64, 64)
    slice_strided(block)
    assert type(block.conv_1x1.conv) is SlicedConv2d
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        block.zero_grad()
        block.to(memory_format=layout)(x.contiguous(memory_format=layout)).square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert_same(ours, theirs)


def test_a_folded_network_has_fewer_norms_and_the_same_maps():
    model = lived_in(DetectionModel(load_spec("yolov5s-repghost.yaml", nc=2)))
    merged = folded(model)
    assert len(norms(model)) - len(norms(merged)) == 2 * 2 * 16  # two norms less in each of two modules a bottleneck
    for ours, theirs in zip(run(merged, images()), run(model, images()), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("make, fault", [
    (lambda: RepVGGBlock(8, 8, 3), "its stride is 1 or 2, not 3"),
    (lambda: RepGhostModule(8, 8, dw_size=2), "its kernel is an odd whole number, not 2"),
    (lambda: RepGhostBneck(8, 8, 3, 16, 0, 1, 4), "its kernel is an odd whole number, not 4"),
    (lambda: RepGhostBneck(8, 8, 2, 16), "its kernel is an odd whole number, not 2"),
    (lambda: RepGhostBneck(8, 8, 3, 16, -0.25), "its squeeze-and-excitation ratio is between 0 (none) and 1, not -0.25"),
])  # fmt: skip
def test_bad_arguments_are_told(make, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        make()
