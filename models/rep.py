"""Blocks that train with parallel branches and run as one convolution: RepVGG (Ding et al., CVPR 2021) and RepGhost (Chen et al., 2022).

`reparameterize()` adds the branches up, in place: the outputs in eval mode stay. Member names are those of the published ImageNet weights.
"""
from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.bneck import bneck_of_4, check_bneck, to_width_of_4
from models.ghost import GhostFrame
from models.layers import Conv, conv_bn
from models.registry import register, to_width


@torch.no_grad()
def merge_branches(like: nn.Conv2d, branches: Iterable[tuple[nn.Conv2d | None, nn.BatchNorm2d]]) -> nn.Conv2d:
    """One convolution with a bias that gives, in eval mode, the branches' sum.

    Args:
        like: the widest branch's convolution: the result has its geometry.
        branches: each one's convolution, of `like`'s or a smaller kernel, or None where it takes the input as it is; and its batch norm.
    """
    weight, bias = torch.zeros_like(like.weight), like.weight.new_zeros(like.out_channels)
    for conv, norm in branches:
        kernel = nn.init.dirac_(torch.empty_like(like.weight), like.groups) if conv is None else conv.weight
        kernel, shift = fuse_conv_bn_weights(kernel, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        rows, columns = ((a - b) // 2 for a, b in zip(like.kernel_size, kernel.shape[2:], strict=True))
        weight += F.pad(kernel, (columns, columns, rows, rows))
        bias += shift
    merged = copy.deepcopy(like)
    merged.weight, merged.bias = nn.Parameter(weight), nn.Parameter(bias)
    return merged


@register("RepVGGBlock", channels=to_width)
class RepVGGBlock(nn.Module):
    """3x3, 1x1 and, where shapes agree, the input itself, each with batch norm, summed; ReLU (section 3.2). (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(self, c1: int, c2: int, s: int = 1) -> None:
        super().__init__()
        check_bneck(3, s)
        self.conv_kxk = Conv(c1, c2, 3, s, act=False)
        self.conv_1x1 = Conv(c1, c2, 1, s, act=False)
        self.identity = nn.BatchNorm2d(c1) if s == 1 and c1 == c2 else None
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_kxk(x)
        if self.conv_1x1 is not None:
            y = y + self.conv_1x1(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return self.act(y)

    def reparameterize(self) -> None:
        """Fold all branches into the 3x3 convolution (section 3.3); again, it does nothing."""
        if self.conv_1x1 is None:
            return
        branches = [(conv.conv, conv.bn) for conv in (self.conv_kxk, self.conv_1x1)]
        if self.identity is not None:
            branches.append((None, self.identity))
        self.conv_kxk = merge_branches(self.conv_kxk.conv, branches)
        self.conv_1x1 = self.identity = None


@register("RepGhostModule", channels=to_width_of_4)
class RepGhostModule(nn.Module):
    """A Ghost module that adds where GhostNet's concatenates, so that its halves fold (section 3.2). (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, relu: bool = True, dw_size: int = 3) -> None:
        super().__init__()
        check_bneck(dw_size, s)
        self.primary_conv = conv_bn(c1, c2, k, s, act=nn.ReLU if relu else None)
        self.fusion_bn = nn.Sequential(nn.BatchNorm2d(c2))
        self.cheap_operation = conv_bn(c2, c2, dw_size, g=c2)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary_conv(x)
        y = self.cheap_operation(x)
        return self.relu(y if self.fusion_bn is None else y + self.fusion_bn(x))

    def reparameterize(self) -> None:
        """Fold the batch norm beside it into the depthwise convolution; again, it does nothing."""
        if self.fusion_bn is None:
            return
        conv, norm = self.cheap_operation
        self.cheap_operation = merge_branches(conv, [(conv, norm), (None, self.fusion_bn[0])])
        self.fusion_bn = None


@register("RepGhostBneck", channels=bneck_of_4)
class RepGhostBneck(GhostFrame):
    """RepGhost's bottleneck (section 3.3): GhostNet's with RepGhost modules at half the expansion. (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(self, c1: int, c2: int, k: int, expansion: int, se: float = 0.0, s: int = 1, dw_size: int = 3) -> None:
        first, second = (partial(RepGhostModule, relu=relu, dw_size=dw_size) for relu in (True, False))
        super().__init__(c1, c2, k, expansion, se, s, first, second)
