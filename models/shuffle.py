"""ShuffleNetV2 and light-head blocks (Ma et al., ShuffleNet V2, ECCV 2018; guidelines G1-G4). YAML names are lower case as users' files have them."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.bneck import to_width_of_4
from models.layers import same_padding
from models.registry import register, to_width


def shuffle_join(a: Tensor, b: Tensor) -> Tensor:
    """Concatenation and channel shuffle with 2 groups: a[0], b[0], a[1], b[1] … (B, C, H, W) twice -> (B, 2C, H, W).

    The layout stays `b`'s: with channels last the paper's reshaping of a concatenation takes three times as long. Otherwise it is the paper's, as
    the runtimes that a network is exported to know it best.
    """
    if _is_channels_last(b):
        pairs = torch.stack((a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)), -1)  # (B, H, W, C, 2)
        return pairs.flatten(3).permute(0, 3, 1, 2)
    x = torch.cat((a, b), 1)
    return x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def _is_channels_last(x: Tensor) -> bool:
    """And that alone: one channel, or one pixel, is both layouts, and what the plain one's code does serves it too."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class ChannelSplit(nn.Module):
    """Two halves of the channels, or as many as `narrow` was told. (B, C, H, W) -> two (B, …, H, W)."""

    sizes: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.sizes, 1) if self.sizes else x.chunk(2, 1)

    def narrowed(self, keep: Sequence[np.ndarray]) -> list[int]:
        """What `narrow` takes once only the channels in `keep` (C,) are there."""
        half = self.sizes[0] if self.sizes else len(keep[0]) // 2
        return [int(keep[0][:half].sum()), int(keep[0][half:].sum())]

    def narrow(self, sizes: Sequence[int | None]) -> None:
        if len(sizes) != 2 or None in sizes:
            raise ValueError(f"a split takes two numbers, found {list(sizes)}")
        self.sizes = tuple(sizes)


class ChannelShuffle(nn.Module):
    """`shuffle_join`, or after `narrow` the inputs joined in another order. (B, C1, H, W), (B, C2, H, W) -> (B, C1 + C2, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", None, persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.order is None:
            return shuffle_join(a, b)
        if _is_channels_last(b):
            x = torch.cat((a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)), 3)  # a table with a row for each pixel, so that the layout stays
            return x.flatten(0, 2).index_select(1, self.order).view(x.shape).permute(0, 3, 1, 2)
        x = torch.cat((a, b), 1)
        # Not straight on the channels: OpenVINO takes any such gather for a reversal of them and folds it, wrongly, into the next convolution.
        return x.flatten(2).index_select(1, self.order).view(x.shape)

    def narrowed(self, keep: Sequence[np.ndarray]) -> list[int]:
        """What `narrow` takes once only the channels in `keep`, (C1,) and (C2,), are there: each output channel's place in their concatenation."""
        kept = np.concatenate(keep)
        order = np.arange(len(kept)).reshape(2, -1).T.ravel() if self.order is None else self.order.cpu().numpy()
        places = np.cumsum(kept) - 1
        return places[order[kept[order]]].tolist()

    def narrow(self, order: Sequence[int]) -> None:
        if set(order) != set(range(len(order))):
            raise ValueError("a shuffle's order names each of its channels once")
        self.order = torch.tensor(order, device="cpu")


@register("conv_bn_relu_maxpool", channels=to_width)
class conv_bn_relu_maxpool(nn.Module):
    """ShuffleNetV2's stem. (B, c1, H, W) -> (B, c2, H/4, W/4)."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(c1, c2, 3, 2, 1, bias=False), nn.BatchNorm2d(c2), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.conv(x))


@register("Shuffle_Block", channels=to_width)
class Shuffle_Block(nn.Module):
    """ShuffleNetV2's unit (figure 3 c and d). (B, c1, H, W) -> (B, c2, H/stride, W/stride).

    Stride 1 keeps half of the channels as they are and convolves the other half; stride 2 convolves all of them in both branches.

    Raises:
        ValueError: an odd c2, a stride other than 1 and 2, or stride 1 with c1 != c2.
    """

    def __init__(self, c1: int, c2: int, stride: int = 1) -> None:
        super().__init__()
        if stride not in (1, 2) or c2 % 2 or (stride == 1 and c1 != c2):
            raise ValueError(f"Shuffle_Block needs stride 1 with equal widths or stride 2, and even widths: got {c1} -> {c2}, stride {stride}")
        half = c2 // 2
        if stride == 2:
            self.branch1 = nn.Sequential(*_depthwise(c1, 3, 2), *_pointwise(c1, half))
        self.split = ChannelSplit() if stride == 1 else None
        self.shuffle = ChannelShuffle()
        self.branch2 = nn.Sequential(*_pointwise(c1 if stride == 2 else half, half), *_depthwise(half, 3, stride), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        if self.split is None:
            return self.shuffle(self.branch1(x), self.branch2(x))
        kept, worked = self.split(x)
        return self.shuffle(kept, self.branch2(worked))


@register("ShuffleUnit", channels=to_width_of_4)
class ShuffleUnit(Shuffle_Block):
    """Shuffle_Block in the paper's own widths, such as 116 and 244, which are multiples of 4."""


def _depthwise(channels: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, channels, kernel, stride, same_padding(kernel), groups=channels, bias=False), nn.BatchNorm2d(channels)


def _pointwise(c1: int, c2: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(c1, c2, 1, bias=False), nn.BatchNorm2d(c2), nn.ReLU(inplace=True)


@register("DWConvblock", channels=to_width)
class DWConvblock(nn.Module):
    """Depthwise k x k, then 1x1, each with batch norm and ReLU. (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _depthwise(c1, k, s)
        self.conv2 = nn.Conv2d(c1, c2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(x)))
