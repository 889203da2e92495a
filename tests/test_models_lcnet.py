"""PP-LCNet's block against timm's network, in the rows of our YAML."""
from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transplant import assert_same_stages, assert_trains, backbone, lived_in, parameters

from models.lcnet import DepthSepConv


def test_timms_weights_give_timms_stages():
    timm = pytest.importorskip("timm", reason="the oracle: pip install timm")
    torch.manual_seed(0)
    net = lived_in(timm.create_model("lcnet_100", pretrained=False))
    stem = nn.Sequential(net.conv_stem, net.bn1)
    blocks = backbone("yolov5s-lcnet.yaml")
    assert parameters(*blocks) == parameters(net) - parameters(net.conv_head, net.classifier)
    assert parameters(net) == 2_953_800  # of the published classifier, 2.96 M in the paper
    assert_same_stages(blocks, [stem, *(block for stage in net.blocks for block in stage)])


@pytest.mark.parametrize("args", [(16, 16), (16, 24, 5, 2, 0.25)])
def test_gradients_flow(args):
    torch.manual_seed(0)
    assert_trains(lived_in(DepthSepConv(*args)), torch.randn(2, 16, 8, 6))


@pytest.mark.parametrize("args, fault", [
    ((8, 8, 2), "its kernel is an odd whole number, not 2"),
    ((8, 8, "3"), "its kernel is an odd whole number, not '3'"),
    ((8, 8, 3, 4), "its stride is 1 or 2, not 4"),
    ((8, 8, 3, 1, 4), "its squeeze-and-excitation ratio is between 0 (none) and 1, not 4"),
    ((8, 8, 3, 1, "SE"), "its squeeze-and-excitation ratio is between 0 (none) and 1, not 'SE'"),
])  # fmt: skip
def test_bad_arguments_are_told(args, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        DepthSepConv(*args)
