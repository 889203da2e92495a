"""ShuffleNetV2's unit against torchvision's networks, in the rows of our YAMLs. Its permutation and halves: test_models_blocks.py."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models
from transplant import assert_same_stages, assert_trains, backbone, lived_in, parameters

from models.shuffle import Shuffle_Block, ShuffleUnit
from models.spec import ModelSpec, load_spec
from models.yolo import DetectionModel


@pytest.mark.parametrize("yaml, name, size", [
    ("yolov5n-shufflenetv2-0.5x.yaml", "shufflenet_v2_x0_5", 1_366_792),
    ("yolov5s-shufflenetv2-1.0x.yaml", "shufflenet_v2_x1_0", 2_278_604),
    ("yolov5s-shufflenetv2-1.5x.yaml", "shufflenet_v2_x1_5", 3_503_624),
    ("yolov5s-shufflenetv2-2.0x.yaml", "shufflenet_v2_x2_0", 7_393_996),
])  # fmt: skip
def test_torchvisions_weights_give_torchvisions_stages(yaml, name, size):
    torch.manual_seed(0)
    net = lived_in(getattr(torchvision_models, name)(weights=None))
    blocks = backbone(yaml)
    assert parameters(*blocks) + parameters(net.conv5, net.fc) == size  # the published classifier's
    assert_same_stages(blocks, [nn.Sequential(net.conv1, net.maxpool), *net.stage2, *net.stage3, *net.stage4])


@pytest.mark.parametrize("module, width, built", [("ShuffleUnit", 1.0, 116), ("Shuffle_Block", 1.0, 120), ("ShuffleUnit", 0.5, 60)])
def test_units_have_the_papers_widths(module, width, built):
    """116 times 0.5 is 58, of which the nearest multiple of 4 (that is not far below) is 60."""
    content = load_spec("yolov5s-shufflenetv2-1.0x.yaml").to_dict() | {"width_multiple": width}
    content["backbone"][1][2] = content["backbone"][2][2] = module
    assert DetectionModel(ModelSpec.from_dict(content, "shuffle")).row_shapes[1][0] == built


@pytest.mark.parametrize("cls", [Shuffle_Block, ShuffleUnit])
@pytest.mark.parametrize("args", [(16, 16, 1), (16, 24, 2)])
def test_gradients_flow(cls, args):
    torch.manual_seed(0)
    assert_trains(lived_in(cls(*args)), torch.randn(2, 16, 8, 6))


@pytest.mark.parametrize("args", [(16, 24, 1), (16, 16, 3), (15, 15, 1), (16, 16, "2")])
def test_bad_arguments_are_told(args):
    with pytest.raises(ValueError, match="needs stride 1 with equal widths or stride 2, and even widths"):
        ShuffleUnit(*args)
