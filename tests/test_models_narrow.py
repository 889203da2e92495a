"""Each kind of layer made narrower, and what it can't be."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.narrow import narrow
from models.shuffle import ChannelShuffle, ChannelSplit, shuffle_join
from models.spec import load_spec
from models.yolo import DetectionModel
from utils.errors import UserError


def narrowed(layer: nn.Module, *sizes: int | None) -> nn.Module:
    narrow(nn.ModuleList([layer]), {"0": sizes}, "my.yaml")
    return layer


def convolution(c1: int, c2: int, groups: int = 1, transposed: bool = False, **options) -> nn.Module:
    return (nn.ConvTranspose2d if transposed else nn.Conv2d)(c1, c2, 3, padding=1, groups=groups, **options)


@pytest.mark.parametrize(("layer", "sizes", "shape", "weight"), [
    (convolution(8, 6), (4, 3), (3, 4, 3, 3), 3), (convolution(8, 6), (None, 3), (3, 8, 3, 3), 3), (convolution(8, 6), (4, None), (6, 4, 3, 3), 6),
    (convolution(8, 6), (None, None), (6, 8, 3, 3), 6), (convolution(8, 6, 2), (4, 2), (2, 2, 3, 3), 2),
    (convolution(8, 8, 8), (3, 3), (3, 1, 3, 3), 3), (convolution(8, 16, 8), (3, 6), (6, 1, 3, 3), 6),
    (convolution(8, 16, 8), (1, 3), (3, 1, 3, 3), 3),  # of one channel nothing is depthwise
    (convolution(8, 6, 2), (1, 1), (1, 1, 3, 3), 1),  # a group for each channel, then fewer
    (convolution(8, 6, transposed=True), (4, 3), (4, 3, 3, 3), 3), (convolution(8, 6, 2, transposed=True), (4, 2), (4, 1, 3, 3), 2),
    (convolution(8, 8, 8, transposed=True), (3, 3), (3, 1, 3, 3), 3), (nn.Linear(8, 6), (4, 3), (3, 4), 3),
], ids=str)  # fmt: skip
def test_layers_that_multiply(layer: nn.Module, sizes: tuple, shape: tuple, weight: int):
    layer = narrowed(layer, *sizes)
    assert layer.weight.shape == shape and layer.bias.shape == (weight,) and layer.weight.requires_grad
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    x = torch.rand(2, inputs, 5, 5)
    y = layer(x.movedim(1, -1)).movedim(-1, 1) if isinstance(layer, nn.Linear) else layer(x)
    assert y.shape == (2, weight, 5, 5)
    # Drawn as a layer of this size is: evenly between plus and minus 1 / sqrt(fan in)
    bound = 1 / layer.weight[0].numel() ** 0.5
    assert 0.5 * bound < layer.weight.abs().max() <= bound * 1.0001


def test_a_layer_without_bias_keeps_none():
    assert narrowed(convolution(8, 6, bias=False), 4, 3).bias is None


def test_norms_keep_their_settings():
    norm = narrowed(nn.BatchNorm2d(8, eps=1e-3, momentum=0.03), 3)
    assert (norm.num_features, norm.eps, norm.momentum) == (3, 1e-3, 0.03) and {t.shape for t in norm.state_dict().values()} == {(3,), ()}
    assert (norm.weight == 1).all() and (norm.running_var == 1).all() and norm.weight.requires_grad and not norm.running_mean.requires_grad
    assert set(norm.state_dict()) == set(nn.BatchNorm2d(3).state_dict())
    assert narrowed(nn.InstanceNorm2d(8, affine=True), 3)(torch.rand(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_a_split_of_unequal_parts():
    a, b = narrowed(ChannelSplit(), 3, 2)(torch.arange(5.0).view(1, 5, 1, 1))
    assert a.flatten().tolist() == [0, 1, 2] and b.flatten().tolist() == [3, 4]


def test_a_shuffle_of_what_is_left():
    """Removing channels before it equals removing them after it."""
    a, b = torch.arange(4.0).view(1, 4, 1, 1), torch.arange(4.0, 8).view(1, 4, 1, 1)
    keep = [np.array([True, False, True, True]), np.array([False, True, True, False])]
    shuffle = ChannelShuffle()
    left = narrowed(ChannelShuffle(), *shuffle.narrowed(keep))
    kept = torch.from_numpy(np.concatenate(keep))
    found = left(a[:, torch.from_numpy(keep[0])], b[:, torch.from_numpy(keep[1])]).flatten()
    whole = shuffle_join(a, b).flatten()
    assert torch.equal(found, whole[kept[whole.long()]]) and found.tolist() == [0, 5, 2, 6, 3]
    again = [np.array([True, True, False]), np.array([False, True])]  # of 0, 2, 3 and 5, 6
    least = narrowed(ChannelShuffle(), *left.narrowed(again))
    assert least(torch.tensor([0.0, 2]).view(1, 2, 1, 1), torch.tensor([6.0]).view(1, 1, 1, 1)).flatten().tolist() == [0, 2, 6]


@pytest.mark.parametrize(("layer", "sizes", "reason"), [
    (convolution(8, 6), (9, 3), "9 is not between 1 and its own 8"), (convolution(8, 6), (4, 0), "0 is not between 1 and its own 6"),
    (convolution(8, 6), (4,), r"takes 2 numbers, found \[4\]"), (convolution(8, 6, 2), (3, 2), "3 to 2 channels don't divide by its 2 groups"),
    (convolution(8, 6, 2), (4, 3), "don't divide"), (convolution(8, 8, 8), (3, 4), "3 to 4 channels don't divide by its 3 groups"),
    (nn.BatchNorm2d(8), (4, 4), "takes 1 numbers"), (nn.BatchNorm2d(8), (9,), "9 is not between"), (nn.Linear(8, 6), (4, 7), "7 is not between"),
    (ChannelShuffle(), (0, 0), "a shuffle's order names each of its channels once"), (ChannelShuffle(), (1, 2), "names each"),
    (ChannelShuffle(), (0, None), "order"), (ChannelSplit(), (1, None), "a split takes two numbers"), (ChannelSplit(), (1,), "a split takes two"),
    (nn.GroupNorm(2, 8), (4,), "a GroupNorm can't be narrowed"), (nn.SiLU(), (4,), "a SiLU can't be narrowed"),
    (nn.Sequential(convolution(8, 6)), (4, 3), "a Sequential can't be narrowed"),
], ids=str)  # fmt: skip
def test_what_a_layer_can_not_be(layer: nn.Module, sizes: tuple, reason: str):
    with pytest.raises(UserError, match=rf"^my.yaml: widths of 0: .*{reason}"):
        narrowed(layer, *sizes)


@pytest.mark.parametrize("name", ["1", "x", "", "0.0", "0..weight", "0.weight", "__class__", "0.forward", "." * 50])
def test_a_name_of_no_layer(name: str):
    with pytest.raises(UserError, match=r"^my.yaml: widths"):
        narrow(nn.ModuleList([convolution(8, 6)]), {name: (4, 3)}, "my.yaml")


def test_widths_that_do_not_fit_each_other_name_the_row():
    spec = replace(load_spec("yolov5n.yaml", 3), widths={"3.conv": (16, 8)})  # row 3 gets 32
    with pytest.raises(UserError, match=r"yolov5n.yaml: row 3 .*expected input.* 16 channels, but got 32"):
        DetectionModel(spec)
