"""Every block of the registry: what its channel rule promises, gradients, layouts; hand-worked cases; the state_dict keys as an interface."""
from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import common
from models.registry import Wiring, block_names, find_block
from models.shuffle import shuffle_join
from utils.files import ROOT

SIZE = 16
# name -> (input channels, YAML args, expected (C, H, W) of inputs 16 px wide at width multiple 1)
EXAMPLES: dict[str, tuple[list[int], list, tuple[int, int, int]]] = {
    "Conv": ([8], [16, 3, 2], (16, 8, 8)),
    "DWConv": ([8], [24, 3, 1], (24, 16, 16)),
    "DWConvTranspose2d": ([8], [16, 4, 2, 1], (16, 32, 32)),
    "MixConv2d": ([8], [16, [1, 3, 5], 2], (16, 8, 8)),
    "SPP": ([8], [16, [5, 9, 13]], (16, 16, 16)),
    "SPPF": ([8], [16, 5], (16, 16, 16)),
    "SE": ([16], [0.25], (16, 16, 16)),
    "Focus": ([3], [16, 3], (16, 8, 8)),
    "Contract": ([4], [2], (16, 8, 8)),
    "Expand": ([16], [2], (4, 32, 32)),
    "Concat": ([8, 16, 4], [1], (28, 16, 16)),
    "ADD": ([8, 8], [0.5], (8, 16, 16)),
    "Bottleneck": ([16], [16], (16, 16, 16)),
    "CrossConv": ([8], [16, 3, 2], (16, 8, 8)),
    "BottleneckCSP": ([8], [16], (16, 16, 16)),
    "C3": ([8], [16, False], (16, 16, 16)),
    "C3x": ([8], [16], (16, 16, 16)),
    "C3SPP": ([8], [16], (16, 16, 16)),
    "C3TR": ([8], [16], (16, 16, 16)),
    "GhostConv": ([8], [16, 3, 2], (16, 8, 8)),
    "GhostBottleneck": ([8], [16, 3, 2], (16, 8, 8)),
    "C3Ghost": ([8], [16, False], (16, 16, 16)),
    "GhostStem": ([3], [20], (20, 8, 8)),
    "GhostModule": ([8], [20, 3, 2], (20, 8, 8)),
    "GBneck": ([8], [12, 5, 24, 0.25, 2], (12, 8, 8)),
    "conv_bn_relu_maxpool": ([3], [16], (16, 4, 4)),
    "Shuffle_Block": ([16], [32, 2], (32, 8, 8)),
    "DWConvblock": ([8], [16, 3, 2], (16, 8, 8)),
    "nn.Conv2d": ([8], [16, 3, 2, 1], (16, 8, 8)),
    "nn.ConvTranspose2d": ([8], [16, 2, 2], (16, 32, 32)),
    "nn.BatchNorm2d": ([8], [], (8, 16, 16)),
    "nn.InstanceNorm2d": ([8], [], (8, 16, 16)),
    "nn.Upsample": ([8], [None, 2, "nearest"], (8, 32, 32)),
    "nn.UpsamplingNearest2d": ([8], [None, 2], (8, 32, 32)),
    "nn.UpsamplingBilinear2d": ([8], [None, 2], (8, 32, 32)),
    "nn.MaxPool2d": ([8], [2, 2, 0], (8, 8, 8)),
    "nn.AvgPool2d": ([8], [2], (8, 8, 8)),
    "nn.AdaptiveAvgPool2d": ([8], [1], (8, 1, 1)),
    "nn.AdaptiveMaxPool2d": ([8], [4], (8, 4, 4)),
    "nn.ZeroPad2d": ([8], [[0, 1, 0, 1]], (8, 17, 17)),
    "nn.ReflectionPad2d": ([8], [1], (8, 18, 18)),
    "nn.ReplicationPad2d": ([8], [1], (8, 18, 18)),
    **{f"nn.{name}": ([8], [], (8, 16, 16)) for name in (
        "Identity", "Dropout", "Dropout2d", "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh",
        "Hardswish", "Hardsigmoid")},
    "GhostModuleV2": ([8], [20, 3, 2], (20, 8, 8)),
    "GBneckV2": ([8], [12, 5, 24, 0.25, 2], (12, 8, 8)),
    "ShuffleUnit": ([16], [20, 2], (20, 8, 8)),
    "MobileStem": ([3], [16], (16, 8, 8)),
    "InvertedResidual": ([8], [16, 5, 24, True, "RE", 2], (16, 8, 8)),
    "MBConv": ([8], [16, 3, 4, 2], (16, 8, 8)),
    "FusedMBConv": ([8], [16, 3, 4, 2], (16, 8, 8)),
    "DepthSepConv": ([8], [16, 5, 2, 0.25], (16, 8, 8)),
    "RepVGGBlock": ([8], [16, 2], (16, 8, 8)),
    "RepGhostModule": ([8], [20, 3, 2], (20, 8, 8)),
    "RepGhostBneck": ([8], [12, 5, 24, 0.25, 2], (12, 8, 8)),
}  # fmt: skip
EVERY_BLOCK = pytest.mark.parametrize("name", EXAMPLES)


def scale(width: int) -> int:
    if not isinstance(width, int):
        raise ValueError(f"no width: {width}")
    return math.ceil(width / 8) * 8


def wire(name: str, inputs: list[int], args: list, repeats: int = 2) -> tuple[nn.Module, Wiring]:
    block = find_block(name)
    wiring = block.channels(inputs, list(args), scale)
    built = list(wiring.args)
    if block.repeats == "inside":
        built.insert(2, repeats)
    return block.cls(*built), wiring


def example(name: str, batch: int = 2) -> tuple[nn.Module, Tensor | list[Tensor], Wiring]:
    """The example block with batch norm away from its identity start, random inputs, and what the rule promised."""
    torch.manual_seed(0)
    channels, args, _ = EXAMPLES[name]
    module, wiring = wire(name, channels, args)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    inputs = [torch.randn(batch, c, SIZE, SIZE) for c in channels]
    return module, inputs if len(inputs) > 1 else inputs[0], wiring


def each(x: Tensor | list[Tensor], change) -> Tensor | list[Tensor]:
    return [change(t) for t in x] if isinstance(x, list) else change(x)


def test_every_registered_block_has_an_example():
    ours = {name for name in block_names() if find_block(name).cls.__module__.startswith(("models.", "torch.nn."))}
    assert ours - {"Detect", "Level", "Timm", "Torchvision"} == set(EXAMPLES)  # the latter three: tests/test_models_backbones.py


@EVERY_BLOCK
def test_shape_is_what_the_rule_promises(name):
    module, x, wiring = example(name)
    assert tuple(module(x).shape[1:]) == EXAMPLES[name][2]
    assert wiring.out_channels == EXAMPLES[name][2][0]


@EVERY_BLOCK
def test_gradients_reach_inputs_and_parameters(name):
    module, x, _ = example(name)
    x = each(x, lambda t: t.requires_grad_())
    module(x if isinstance(x, list) else x * 1).square().sum().backward()  # `* 1`: an in-place activation may not change a leaf
    for tensor in [*(x if isinstance(x, list) else [x]), *module.parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    assert (x[0] if isinstance(x, list) else x).grad.abs().max() > 0


@EVERY_BLOCK
def test_one_by_one_equals_batched(name):
    module, x, _ = example(name, batch=3)
    module.eval()
    with torch.no_grad():
        batched = module(each(x, Tensor.clone))
        singles = [module(each(x, lambda t, i=i: t[i : i + 1].clone())) for i in range(3)]
    torch.testing.assert_close(torch.cat(singles), batched, rtol=1e-4, atol=1e-5)


@EVERY_BLOCK
def test_channels_last_gives_the_same(name):
    module, x, _ = example(name)
    module.eval()
    with torch.no_grad():
        expected = module(each(x, Tensor.clone))
        found = module.to(memory_format=torch.channels_last)(each(x, lambda t: t.clone(memory_format=torch.channels_last)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@EVERY_BLOCK
def test_state_dict_round_trip(name):
    module, x, _ = example(name)
    other = wire(name, *EXAMPLES[name][:2])[0]
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(each(x, Tensor.clone)), module.eval()(each(x, Tensor.clone)))


@pytest.mark.parametrize("name", ["C3", "C3Ghost", "C3TR", "C3SPP", "C3x", "BottleneckCSP"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_repeats_go_inside(name, repeats):
    module, _ = wire(name, [8], [16], repeats)
    assert len(module.m.layers if name == "C3TR" else module.m) == repeats


@pytest.mark.parametrize("name", ["C3TR", "C3SPP", "C3x", "C3Ghost"])
def test_a_c3_row_may_become_another_of_its_family(name):
    """`[-1, 3, C3, [16, False]]`: the shortcut says nothing to attention and pyramids."""
    assert wire(name, [8], [16, False])[0](torch.zeros(1, 8, 16, 16)).shape == (1, 16, 16, 16)
    if name == "C3SPP":
        assert wire(name, [8], [16, False, 1, 0.25])[0].cv1.conv.out_channels == wire(name, [8], [16, [5, 9, 13], 0.25])[0].cv1.conv.out_channels == 4
        assert wire(name, [8], [16, False, 1])[0].cv1.conv.out_channels == 8, "groups"
        with pytest.raises(ValueError, match="takes channels, sizes of pools and e, found 1 besides"):
            wire(name, [8], [16, [5, 9, 13], 0.25, 1])
        assert common.C3SPP(8, 16, 1, False, e=0.25).cv1.conv.out_channels == 4 and common.C3SPP(8, 16, 1, False, 1).cv1.conv.out_channels == 8
    if name == "C3TR":
        assert wire(name, [8], [16, True])[0].state_dict().keys() == wire(name, [8], [16])[0].state_dict().keys()
        assert wire(name, [8], [16, False])[0].m.layers[0].attention.num_heads == 4


def test_a_conv_row_from_before_dilation_had_a_place():
    """[c2, k, s, p, g, act], as rows were until YOLOv5 7.0."""
    assert isinstance(wire("Conv", [8], [16, 3, 1, None, 1, False])[0].act, torch.nn.Identity)
    assert wire("Conv", [8], [16, 3, 1, None, 1, True])[0].conv.dilation == (1, 1)


@pytest.mark.parametrize("name, inputs, args, words", [
    ("Conv", [8], [], "output channels"),
    ("Conv", [8, 8], [16], "one input"),
    ("GhostModule", [8], [], "output channels"),
    ("GBneck", [8], [16, 3], "expansion"),
    ("GBneck", [8], ["wide", 3, 16], "no width: wide"),
    ("GhostConv", [8], [16, 3, 1, 1, True, 1], "ratio"),
    ("GhostConv", [8], [16, 3, 1, 1, True, 2.5], "ratio"),
    ("Shuffle_Block", [16], [32, 1], "equal widths"),
    ("Shuffle_Block", [16], [32, 3], "stride"),
    ("ADD", [8, 16], [1], "8 and 16"),
    ("Expand", [6], [2], "6 channels"),
])  # fmt: skip
def test_a_misfit_is_named(name, inputs, args, words):
    with pytest.raises(ValueError, match=words) as caught:
        wire(name, inputs, args)
    assert len(str(caught.value)) < 200


# Hand-worked cases


def test_contract_by_hand_and_expand_back():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    contracted = common.Contract(2)(x)
    assert contracted[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert contracted[0, 0].tolist() == [[0, 2], [8, 10]]
    x = torch.randn(2, 3, 6, 12)
    assert torch.equal(common.Expand(3)(common.Contract(3)(x)), x)
    y = torch.randn(2, 8, 5, 3)
    assert torch.equal(common.Contract(2)(common.Expand(2)(y)), y)


def test_focus_takes_rows_before_columns():
    focus = common.Focus(1, 4).eval()
    focus.conv.act, focus.conv.bn = nn.Identity(), nn.Identity()
    nn.init.dirac_(focus.conv.conv.weight)
    pixels = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert focus(pixels).flatten().tolist() == [0, 2, 1, 3]  # top left, bottom left, top right, bottom right


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shuffle_join_is_the_papers_permutation_and_keeps_the_layout(layout):
    a = torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 4, 5).contiguous(memory_format=layout)
    b = (a + 3).contiguous(memory_format=layout)
    joined = shuffle_join(a, b)
    assert joined[1, :, 2, 2].tolist() == [0, 3, 1, 4, 2, 5]
    assert joined.is_contiguous(memory_format=layout)
    a, b = (torch.randn(2, 6, 4, 5).contiguous(memory_format=layout) for _ in range(2))
    assert torch.equal(shuffle_join(a, b), F.channel_shuffle(torch.cat((a, b), 1), 2))


def test_shuffle_block_of_stride_1_keeps_its_first_half():
    block, x = common.Shuffle_Block(16, 16, 1).eval(), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        y = block(x)
        assert torch.equal(y[:, 0::2], x[:, :8])
        torch.testing.assert_close(y[:, 1::2], block.branch2(x[:, 8:]))


def test_add_by_hand():
    assert common.ADD(0.5)([torch.tensor([1.0]), torch.tensor([4.0])]).item() == 3.0


def test_sppf_equals_spp():
    spp, sppf = common.SPP(8, 8, (5, 9, 13)).eval(), common.SPPF(8, 8, 5).eval()
    sppf.load_state_dict(spp.state_dict())
    x = torch.randn(1, 8, 20, 20)
    torch.testing.assert_close(sppf(x), spp(x))


@pytest.mark.parametrize("cls", [common.Bottleneck, common.GhostBottleneck])
def test_shortcut_adds_the_input_of_equal_width(cls):
    block = cls(8, 8).eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x)


def test_mixconv_shares_and_groups():
    mix = common.MixConv2d(8, 16, (1, 3, 5))
    assert [(m.out_channels, m.kernel_size[0]) for m in mix.m] == [(6, 1), (5, 3), (5, 5)]


@pytest.mark.parametrize("channels, hidden", [(72, 20), (120, 32), (672, 168), (8, 4)])  # GhostNet's SE layers, and a tiny one
def test_se_widths_and_gate(channels, hidden):
    se = common.SE(channels)
    assert se.conv_reduce.out_channels == hidden
    nn.init.zeros_(se.conv_expand.weight)
    nn.init.constant_(se.conv_expand.bias, 1.5)  # hard sigmoid: 1.5 / 6 + 0.5
    x = torch.randn(2, channels, 3, 3)
    torch.testing.assert_close(se(x), x * 0.75)


def test_transformer_mixes_positions_and_takes_any_size():
    block = common.C3TR(8, 8, 1).eval()
    for height, width in ((4, 4), (3, 7), (1, 1)):
        assert block(torch.randn(1, 8, height, width)).shape == (1, 8, height, width)
    x = torch.randn(1, 8, 6, 6)
    moved = x.clone()
    moved[..., 5, 5] += 1
    assert (block(moved) - block(x))[..., 0, 0].abs().max() > 0  # far beyond any 3x3 kernel


# The keys of published weights


CONV = {"conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


def within(*prefixes: str) -> set[str]:
    return {f"{prefix}.{key}" for prefix in prefixes for key in CONV}


def bare(convolutions: list[str], norms: list[str]) -> set[str]:
    return {f"{c}.weight" for c in convolutions} | {f"{n}.{key[3:]}" for n in norms for key in CONV if key.startswith("bn.")}


@pytest.mark.parametrize("module, keys", [
    (common.Conv(8, 8), CONV),
    (common.DWConv(8, 8), CONV),
    (common.Bottleneck(8, 8), within("cv1", "cv2")),
    (common.C3(8, 8, 2), within("cv1", "cv2", "cv3", "m.0.cv1", "m.0.cv2", "m.1.cv1", "m.1.cv2")),
    (common.SPP(8, 8), within("cv1", "cv2")),
    (common.SPPF(8, 8), within("cv1", "cv2")),
    (common.Focus(3, 8), within("conv")),
    (common.GhostConv(8, 8), within("cv1", "cv2")),
    (common.GhostBottleneck(8, 8), within("conv.0.cv1", "conv.0.cv2", "conv.2.cv1", "conv.2.cv2")),
    (common.GhostBottleneck(8, 8, 3, 2), within("conv.0.cv1", "conv.0.cv2", "conv.1", "conv.2.cv1", "conv.2.cv2", "shortcut.0", "shortcut.1")),
    (common.C3Ghost(8, 8, 1), within("cv1", "cv2", "cv3", *(f"m.0.conv.{i}.cv{j}" for i in (0, 2) for j in (1, 2)))),
    (common.conv_bn_relu_maxpool(3, 8), bare(["conv.0"], ["conv.1"])),
    (common.Shuffle_Block(8, 8, 1), bare(["branch2.0", "branch2.3", "branch2.5"], ["branch2.1", "branch2.4", "branch2.6"])),
    (common.Shuffle_Block(8, 8, 2), bare(["branch1.0", "branch1.2", "branch2.0", "branch2.3", "branch2.5"],
                                         ["branch1.1", "branch1.3", "branch2.1", "branch2.4", "branch2.6"])),
    (common.DWConvblock(8, 8), bare(["conv1", "conv2"], ["bn1", "bn2"])),
], ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "")  # fmt: skip
def test_state_dict_keys_are_the_published_ones(module, keys):
    assert set(module.state_dict()) == keys


def test_a_strided_1x1_of_the_image_learns_on_a_cpu():
    """In a process of its own: what is guarded against kills it."""
    code = """
import torch
from models.layers import Conv, slice_strided
conv = Conv(3, 48, 1, 2)
slice_strided(conv)
conv.to(memory_format=torch.channels_last)
plain = torch.nn.functional.conv2d(torch.ones(2, 3, 64, 64), conv.conv.weight, stride=2)
torch.testing.assert_close(conv.conv(torch.ones(2, 3, 64, 64)), plain)
for _ in range(5):
    conv(torch.rand(2, 3, 128, 128).contiguous(memory_format=torch.channels_last)).sum().backward()
print("alive", conv.conv.weight.grad.isfinite().all().item(), list(conv.state_dict()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("alive True ['conv.weight'"), done.stderr
