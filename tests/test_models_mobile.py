"""MobileNetV3's and EfficientNetV2's blocks against torchvision's networks, in the rows of our YAMLs."""
from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models
from transplant import assert_same_stages, assert_trains, backbone, lived_in, parameters

from models.mobile import FusedMBConv, InvertedResidual, MBConv
from models.spec import ModelSpec, load_spec
from models.yolo import DetectionModel
from utils.errors import UserError


def features(name: str) -> tuple[nn.Module, list[nn.Module]]:
    """A torchvision classifier and its stem and blocks, without the last 1x1 convolution."""
    torch.manual_seed(0)
    net = lived_in(getattr(torchvision_models, name)(weights=None))
    stages = net.features[:-1]
    return net, [block for stage in stages for block in (stage if type(stage) is nn.Sequential else [stage])]


@pytest.mark.parametrize("yaml, name, size", [
    ("yolov5n-mobilenetv3-small.yaml", "mobilenet_v3_small", 2_542_856),
    ("yolov5s-mobilenetv3-large.yaml", "mobilenet_v3_large", 5_483_032),
    ("yolov5s-efficientnetv2-s.yaml", "efficientnet_v2_s", 21_458_488),
])  # fmt: skip
def test_torchvisions_weights_give_torchvisions_stages(yaml, name, size):
    net, references = features(name)
    blocks = backbone(yaml)
    assert parameters(*blocks) + parameters(net.features[-1], net.classifier) == size  # the published classifier's
    assert_same_stages(blocks, references)


def test_torchvisions_keys_are_ours_by_one_renaming():
    """`features.n` is `model.n`, the stem's own names aside."""
    net, _ = features("mobilenet_v3_large")
    ours = {key: value.shape for key, value in DetectionModel(load_spec("yolov5s-mobilenetv3-large.yaml")).model[:16].state_dict().items()}
    theirs = {key: value.shape for key, value in net.features[:-1].state_dict().items()}
    assert {key: shape for key, shape in ours.items() if key[:2] != "0."} == {key: shape for key, shape in theirs.items() if key[:2] != "0."}


BLOCKS = {
    "plain": (InvertedResidual, (16, 16, 3, 16, False, "RE")), "gated": (InvertedResidual, (16, 24, 5, 72, True, "HS", 2)),
    "mbconv": (MBConv, (16, 16, 3, 4)), "mbconv unexpanded": (MBConv, (16, 24, 5, 1, 2)),
    "fused": (FusedMBConv, (16, 16, 3, 4)), "fused unexpanded": (FusedMBConv, (16, 24, 3, 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", BLOCKS)
def test_gradients_flow(case):
    cls, args = BLOCKS[case]
    torch.manual_seed(0)
    assert_trains(lived_in(cls(*args)), torch.randn(2, 16, 8, 6))


@pytest.mark.parametrize("cls, args", [(InvertedResidual, (8, 8, 3, 16)), (MBConv, (8, 8)), (FusedMBConv, (8, 8)), (FusedMBConv, (8, 8, 3, 1))])
def test_only_equal_shapes_add_the_input(cls, args):
    x = torch.randn(1, 8, 4, 4)
    still = cls(*args)
    for norm in still.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.zeros_(norm.weight)
    assert torch.equal(still.eval()(x), x)
    wider = cls(8, 16, *args[2:])
    assert wider(torch.randn(2, 8, 4, 4)).shape == (2, 16, 4, 4) and not wider.same


def test_expansion_rounds_up_to_multiples_of_8():
    assert MBConv(24, 24, 3, 3.5).block[1][0].groups == 88  # 84


@pytest.mark.parametrize("cls, args, fault", [
    (InvertedResidual, (8, 8, 4, 16), "its kernel is an odd whole number, not 4"),
    (InvertedResidual, (8, 8, 3, 16, True, "HS", 3), "its stride is 1 or 2, not 3"),
    (InvertedResidual, (8, 8, 3, 16, True, "SiLU"), "the nonlinearity RE or HS, not True and 'SiLU'"),
    (InvertedResidual, (8, 8, 3, 16, 0.25), "SE is true or false"),
    (InvertedResidual, (8, 8, 3, 16, [], "RE"), "SE is true or false"),
    (InvertedResidual, (8, 8, 3, 16, True, ["RE"]), "RE or HS"),
    (MBConv, (8, 8, 3, 0), "its expansion is a number from 1 to 100, not 0"),
    (MBConv, (8, 8, 3, "4"), "its expansion is a number"),
    (MBConv, (8, 8, True), "its kernel is an odd whole number, not True"),
    (FusedMBConv, (8, 8, -1), "its kernel is an odd whole number, not -1"),
    (FusedMBConv, (8, 8, 3, 4, 0), "its stride is 1 or 2, not 0"),
])  # fmt: skip
def test_bad_arguments_are_told(cls, args, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        cls(*args)


def test_a_bad_row_is_named():
    rows = [[-1, 1, "InvertedResidual", [16, 3, 32, True, "relu", 2]]]
    content = {"nc": 2, "anchors": 3, "backbone": rows, "head": [[[0], 1, "Detect", ["nc", "anchors"]]]}
    with pytest.raises(UserError, match=r"^net.yaml: row 0 \(backbone 0\) InvertedResidual: .* the nonlinearity RE or HS"):
        DetectionModel(ModelSpec.from_dict(content, "net.yaml"))
