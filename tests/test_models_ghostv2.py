"""GhostNetV2's blocks against timm's network, in the rows of our YAML, and DFC attention by hand."""
from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transplant import assert_same_stages, assert_trains, backbone, lived_in, parameters

from models.ghost import GBneck, GhostModule
from models.ghostv2 import GBneckV2, GhostModuleV2


def test_timms_weights_give_timms_stages():
    timm = pytest.importorskip("timm", reason="the oracle: pip install timm")
    torch.manual_seed(0)
    net = lived_in(timm.create_model("ghostnetv2_100", pretrained=False))
    stem = nn.Sequential(net.conv_stem, net.bn1, net.act1)
    references = [stem, *(block for stage in net.blocks[:-1] for block in stage)]  # the last is the 1x1 to 960 channels
    blocks = backbone("yolov5s-ghostnetv2.yaml")
    assert [type(block) for block in blocks[1:]] == 2 * [GBneck] + 14 * [GBneckV2]
    assert parameters(*blocks) == parameters(net) - parameters(net.blocks[-1], net.conv_head, net.classifier)
    assert parameters(net) == 6_156_908  # of the published classifier, 6.1 M in the paper
    assert_same_stages(blocks, references)
    assert_same_stages(blocks, references, size=(224, 96))  # P5 of 7 x 3 cells: the mean over 2x2 leaves the last out


def test_attention_looks_along_rows_and_columns():
    """With the value of one cell changed, only cells of the 5 x 5 pooled ones around it may change; GhostModule's own reach is 3 x 3 cells."""
    torch.manual_seed(0)
    module = lived_in(GhostModuleV2(4, 8))
    x = torch.randn(1, 4, 24, 24)
    moved = x.clone()
    moved[..., 10, 12] += 5
    with torch.no_grad():
        changed = (module(moved) - module(x)).abs().amax((0, 1)) > 1e-7
    rows, columns = changed.any(1).nonzero().flatten().tolist(), changed.any(0).nonzero().flatten().tolist()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (6, 15, 8, 17)  # pooled rows 3 to 7 and columns 4 to 8


def test_open_gates_leave_a_ghost_module():
    torch.manual_seed(0)
    module = lived_in(GhostModuleV2(4, 8))
    plain = lived_in(GhostModule(4, 8))
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if not key.startswith("short_conv")})
    nn.init.zeros_(module.short_conv[5].weight)
    nn.init.zeros_(module.short_conv[5].bias)  # a gate of sigmoid(0)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(module(x), 0.5 * plain(x))


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (7, 2), (3, 3)])
def test_takes_any_size(size):
    assert lived_in(GBneckV2(8, 12, 5, 24, 0.25))(torch.randn(1, 8, *size)).shape == (1, 12, *size)


@pytest.mark.parametrize("args", [(16, 16, 3, 32), (16, 24, 5, 32, 0.25, 2)])
def test_gradients_flow(args):
    torch.manual_seed(0)
    assert_trains(lived_in(GBneckV2(*args)), torch.randn(2, 16, 8, 6))


@pytest.mark.parametrize("cls", [GBneck, GBneckV2])
@pytest.mark.parametrize("args, fault", [
    ((8, 8, 4, 16), "its kernel is an odd whole number, not 4"),
    ((8, 8, 3, 16, 2), "its squeeze-and-excitation ratio is between 0 (none) and 1, not 2"),
    ((8, 8, 3, 16, 0, 3), "its stride is 1 or 2, not 3"),
    ((8, 8, 3, 16, 0, 1, 1), "ratio is a whole number from 2 on, not 1"),
])  # fmt: skip
def test_bad_arguments_are_told(cls, args, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        cls(*args)
