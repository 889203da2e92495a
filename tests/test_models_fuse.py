"""Folding batch norms: the same outputs for every family, nothing else touched, and no folding where it would change the result."""
from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transplant import lived_in

from models.fuse import fuse
from models.spec import load_spec
from models.timm_backbone import Timm
from models.yolo import DetectionModel

FAMILIES = ["yolov5n.yaml", "yolov5n-ghost.yaml", "yolov5s-ghostnet.yaml", "yolov5s-shuffle.yaml", "yolov5s-shuffle-c3.yaml", "yolov3-tiny.yaml",
            "yolov5s-transformer.yaml", "yolov5n6.yaml", "yolov5s-timm-lcnet100.yaml", "yolov5s-timm-fastvit-t8.yaml",
            "yolov5s-torchvision-mobilenetv3-small.yaml"]  # fmt: skip


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def assert_same(a: list[Tensor] | Tensor, b: list[Tensor] | Tensor) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_stay_and_no_norm_is_left(name):
    torch.manual_seed(0)
    model = lived_in(DetectionModel(load_spec(name, nc=3))).train()
    for level in model.head.m:
        level.bias.data.zero_()  # so large that they would hide differences
    assert len(norms(model)) > 10 and model.training
    before = copy.deepcopy(model.state_dict())
    fused = model.fused()
    assert norms(fused) == [] and not fused.training and fused.strides == model.strides and fused.names == model.names
    assert model.training and len(norms(model)) > 10
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    images = torch.rand(2, 3, 128, 64)
    with torch.no_grad():
        assert_same(model.eval()(images), fused(images))
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}
    assert not shared  # training goes on beside it


def test_random_numbers_are_left_alone():
    model = lived_in(DetectionModel(load_spec("yolov5n.yaml", nc=2))).train()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model.fused()
    assert torch.equal(states[0], torch.get_rng_state()) and states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_gradients_are_not_kept():
    model = DetectionModel(load_spec("yolov5n-ghost.yaml", nc=2))
    assert all(b.grad_fn is None and not b.is_inference() for b in model.fused().parameters())
    model(torch.rand(1, 3, 64, 64))[0].sum().backward()  # the original still trains
    assert model.model[0].conv.weight.grad is not None


class Pair(nn.Module):
    """conv -> norm, and whatever `forward` of a child class does besides."""

    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.odd_name = conv or nn.Conv2d(3, 8, 3, padding=1)
        self.another = norm or nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.another(self.odd_name(x))


class UsedTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.odd_name(x)
        return self.another(y) + y


class UsedInAList(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.odd_name(x)
        return torch.cat([self.another(y), y], 1)


class UsedAsAView(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.odd_name(x)
        return self.another(y) * y.flatten(2).mean(-1)[..., None, None]


class UsedIndexed(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.odd_name(x)
        return self.another(y) + y[:, :1]


class UsedByKeyword(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.odd_name(x)
        return torch.add(self.another(y), other=y)


class AlsoReturned(Pair):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.odd_name(x)
        return self.another(y), y


class ActivationBetween(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.another(torch.relu_(self.odd_name(x)))  # in place: the same tensor object reaches the norm


class RunTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.another(self.odd_name(x)) + self.odd_name(x.flip(3))


class BothTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.another(self.odd_name(x).sigmoid()) + self.another(self.odd_name(x.flip(3)))


class NormTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.another(self.another(self.odd_name(x)))


class Standardised(nn.Conv2d):
    """A convolution that computes its weight: scaling the weight changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return self._conv_forward(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True), self.bias)


class ReadsTheShape(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.odd_name(x)
        assert y.shape[1] == 8 and y.dim() == 4 and y.dtype == x.dtype and y.size(0) > 0
        return self.another(y)


UNFOLDED = {
    "used twice": UsedTwice(), "used in a list": UsedInAList(), "used as a view": UsedAsAView(), "used indexed": UsedIndexed(),
    "used by keyword": UsedByKeyword(), "also returned": AlsoReturned(), "activation between": ActivationBetween(), "run twice": RunTwice(),
    "both run twice": BothTwice(), "norm twice": NormTwice(), "own convolution": Pair(Standardised(3, 8, 3, padding=1)),
    "norm of the batch": Pair(norm=nn.BatchNorm2d(8, track_running_stats=False)), "norm of the instance": Pair(norm=nn.InstanceNorm2d(8)),
    "transposed in groups": Pair(nn.ConvTranspose2d(3, 9, 2, 2, groups=3), nn.BatchNorm2d(9)),
    "weight normed": Pair(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))),
}  # fmt: skip
FOLDED = {
    "plain": Pair(), "no bias": Pair(nn.Conv2d(3, 8, 3, bias=False)), "strided": Pair(nn.Conv2d(3, 8, 3, 2, 1, dilation=2)),
    "grouped": Pair(nn.Conv2d(3, 9, 3, groups=3), nn.BatchNorm2d(9)), "transposed": Pair(nn.ConvTranspose2d(3, 8, 4, 2, 1)),
    "no affine": Pair(norm=nn.BatchNorm2d(8, affine=False)),
    "reflected": Pair(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")), "reads the shape": ReadsTheShape(),
}  # fmt: skip


def check(pair: nn.Module, folded: bool) -> None:
    pair = copy.deepcopy(pair)
    for module in pair.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    pair.eval()
    fused = fuse(pair)
    assert isinstance(fused.another, nn.Identity) == folded
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        assert_same(pair(images), fused(images))


@pytest.mark.parametrize("case", UNFOLDED)
def test_what_would_change_stays(case):
    check(UNFOLDED[case], folded=False)


@pytest.mark.parametrize("case", FOLDED)
def test_what_follows_alone_is_folded(case):
    check(FOLDED[case], folded=True)


def test_folding_twice_changes_nothing():
    once = fuse(FOLDED["plain"])
    twice = fuse(once)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_one_unfoldable_block_leaves_the_others_folded():
    model = nn.Sequential(Pair(), UsedTwice(nn.Conv2d(8, 8, 1)), Pair(nn.Conv2d(8, 8, 1)))
    assert norms(fuse(model)) == ["1.another"]


class Branches(nn.Module):
    """Two convolutions side by side that become one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if self.right is None else self.left(x) + self.right(x)

    def reparameterize(self) -> None:
        assert self.right is not None, "asked twice"
        for own, other in zip(self.left.parameters(), self.right.parameters(), strict=True):
            own.data += other.data
        self.right = None


class Around(nn.Module):
    """Merges what it contains by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branches()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def reparameterize(self) -> None:
        self.inner.reparameterize()


@pytest.mark.parametrize("block", [Branches, Around])
def test_branches_are_merged_before_norms_are_folded(block):
    model = lived_in(nn.Sequential(nn.Sequential(block(), nn.BatchNorm2d(8))))
    fused = fuse(model)
    assert norms(fused) == [] and sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 2
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        assert_same(model(images), fused(images))


@pytest.mark.parametrize(("name", "convolutions"), [
    ("repvgg_a0", 22), ("mobileone_s0", 43), ("repghostnet_050", None), ("tf_mobilenetv3_small_minimal_100", None), ("hgnetv2_b0", None),
])  # fmt: skip
@torch.no_grad()
def test_timms_networks_fold(name, convolutions):
    """Its own branches, its batch norms with activations, its convolutions that pad by themselves. The papers' count of convolutions is left."""
    backbone = lived_in(Timm(name))
    fused = fuse(backbone)
    assert norms(fused) == [] and len(norms(backbone)) > 10
    assert convolutions in (None, sum(isinstance(m, nn.Conv2d) for m in fused.modules()))
    images = torch.rand(2, 3, 64, 96)
    assert_same(backbone(images), fused(images))


def test_a_block_that_needs_a_larger_image_than_the_probe():
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReflectionPad2d(40)).eval()
    images = torch.rand(1, 3, 64, 64)
    fused = fuse(network, probe_px=32)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(fused(images), network(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError):
        fuse(nn.Sequential(network, nn.ReflectionPad2d(400)))
