"""The elementary blocks: convolutions with batch norm and activation, and reshaping, joining and pooling layers."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.registry import Scale, Wiring, equal_widths, keep_width, one_input, over_width, register, sum_widths, to_width

Size = int | tuple[int, int]


def same_padding(kernel: Size, dilation: int = 1) -> Size:
    """Padding that keeps the size at stride 1."""
    return dilation * (kernel - 1) // 2 if isinstance(kernel, int) else tuple(dilation * (k - 1) // 2 for k in kernel)


def activation(act: bool | nn.Module) -> nn.Module:
    """True -> the family's default (SiLU), a module -> itself, False -> identity."""
    if isinstance(act, nn.Module):
        return act
    if act not in (True, False):
        raise TypeError(f"act must be true or false, not {act!r}; for all layers of a network the YAML's 'activation:' names another one")
    return nn.SiLU(inplace=True) if act else nn.Identity()


def conv_bn(c1: int, c2: int, k: Size = 1, s: int = 1, g: int = 1, act: type[nn.Module] | None = None) -> nn.Sequential:
    """Members `0` convolution, `1` batch norm and `2` activation, as published ImageNet weights have them."""
    layers: list[nn.Module] = [nn.Conv2d(c1, c2, k, s, same_padding(k), groups=g, bias=False), nn.BatchNorm2d(c2)]
    return nn.Sequential(*layers, act(inplace=True)) if act else nn.Sequential(*layers)


class SlicedConv2d(nn.Conv2d):
    """A 1x1 convolution of stride s, as one of stride 1 on every s-th pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight, self.bias, groups=self.groups)


def slice_strided(module: nn.Module) -> None:
    """Make strided 1x1 convolutions of few channels, such as an image's, sliced ones, in place.

    On a CPU, in fp32 and channels last, oneDNN's gradient of them overruns its buffer and kills the process (uxlfoundation/oneDNN issue 6035):
    of fewer than 8 with AVX2, than 16 with AVX-512.
    """
    for conv in module.modules():
        if type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and max(conv.stride) > 1 and conv.padding == (0, 0) and conv.in_channels < 16:
            conv.__class__ = SlicedConv2d  # the same parameters under the same names


@register("Conv", channels=to_width)
class Conv(nn.Module):
    """Convolution without bias, batch norm, activation. (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(
        self, c1: int, c2: int, k: Size = 1, s: Size = 1, p: Size | None = None, g: int = 1, d: int = 1, act: bool | nn.Module = True
    ) -> None:
        super().__init__()
        if isinstance(d, bool):  # before YOLOv5 7.0 rows had no dilation: what stands there is the activation
            d, act = 1, d
        self.conv = nn.Conv2d(c1, c2, k, s, same_padding(k, d) if p is None else p, d, g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


@register("DWConv", channels=to_width)
class DWConv(Conv):
    """Conv with as many groups as both widths allow; depthwise where they are equal."""

    def __init__(self, c1: int, c2: int, k: Size = 1, s: Size = 1, d: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), d=d, act=act)


@register("DWConvTranspose2d", channels=to_width)
class DWConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution with as many groups as both widths allow: a learned upsampling by `s`."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, padding: int = 0, output_padding: int = 0) -> None:
        super().__init__(c1, c2, k, s, padding, output_padding, groups=math.gcd(c1, c2))


@register("MixConv2d", channels=to_width)
class MixConv2d(nn.Module):
    """Convolutions of several kernel sizes side by side, each making a share of the output (Tan and Le, BMVC 2019)."""

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (1, 3), s: int = 1) -> None:
        super().__init__()
        shares = [c2 // len(k) + (i < c2 % len(k)) for i in range(len(k))]
        self.m = nn.ModuleList(
            nn.Conv2d(c1, share, kernel, s, same_padding(kernel), groups=math.gcd(c1, share), bias=False)
            for kernel, share in zip(k, shares, strict=True)
        )
        self.bn = nn.BatchNorm2d(c2)
        self.act = activation(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(torch.cat([m(x) for m in self.m], 1)))


@register("SPP", channels=to_width)
class SPP(nn.Module):
    """Spatial pyramid pooling: the input beside its maxima over several windows (He et al., ECCV 2014; YOLOv3-SPP)."""

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(hidden * (len(k) + 1), c2)
        self.m = nn.ModuleList(nn.MaxPool2d(window, 1, window // 2) for window in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


@register("SPPF", channels=to_width)
class SPPF(nn.Module):
    """SPP's result with one small window applied three times: a maximum over 5, 9 and 13 for k = 5."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(hidden * 4, c2)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        once = self.m(x)
        twice = self.m(once)
        return self.cv2(torch.cat((x, once, twice, self.m(twice)), 1))


@register("SE", channels=over_width)
class SE(nn.Module):
    """Squeeze-and-excitation: each channel times a weight in [0, 1] from all channels' means (Hu et al., CVPR 2018; hard sigmoid as in GhostNet)."""

    def __init__(self, c1: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = round_to_4(c1 * ratio)
        self.conv_reduce = nn.Conv2d(c1, hidden, 1)
        self.act = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(hidden, c1, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.conv_expand(self.act(self.conv_reduce(mean))))


def round_to_4(channels: float) -> int:
    """The nearest multiple of 4, at least 4 and never below 90 % of `channels` (the rule of MobileNet and GhostNet)."""
    nearest = max(int(channels + 2) // 4 * 4, 4)
    return nearest if nearest >= 0.9 * channels else nearest + 4


def _contracted(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    gain = args[0] if args else 2
    return Wiring([gain], one_input(inputs) * gain**2)


def _expanded(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    gain = args[0] if args else 2
    channels = one_input(inputs)
    if channels % gain**2:
        raise ValueError(f"{channels} channels don't divide by gain {gain} squared")
    return Wiring([gain], channels // gain**2)


@register("Focus", channels=to_width)
class Focus(nn.Module):
    """Every 2x2 pixels into channels, then Conv: a stem without loss. (B, c1, H, W) -> (B, c2, H/2, W/2)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__()
        self.conv = Conv(c1 * 4, c2, k, s, p, g, act=act)

    def forward(self, x: Tensor) -> Tensor:
        # A pool of one pixel is the slice with a step of 2 that ncnn has no layer for; published weights expect this order.
        quarters = [F.max_pool2d(x[..., row:, column:], 1, 2) for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(quarters, 1))


@register("Contract", channels=_contracted)
class Contract(nn.Module):
    """Space to channels. (B, C, H, W) -> (B, gain² C, H/gain, W/gain); output channel (row * gain + column) * C + c."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(3, (-1, self.gain)).unflatten(2, (-1, self.gain))  # (B, C, H/g, g, W/g, g)
        return blocks.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


@register("Expand", channels=_expanded)
class Expand(nn.Module):
    """Channels to space, the inverse of Contract. (B, gain² C, H, W) -> (B, C, H * gain, W * gain)."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (self.gain, self.gain, -1))  # (B, g, g, C, H, W)
        return blocks.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


@register("Concat", channels=sum_widths)
class Concat(nn.Module):
    """Inputs joined along a dimension: channels."""

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.dimension = dimension

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, self.dimension)


@register("ADD", channels=equal_widths)
class ADD(nn.Module):
    """x[0] + alpha * x[1] of one shape."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.add(x[0], x[1], alpha=self.alpha)


_TORCH_LAYERS = {
    to_width: (nn.Conv2d, nn.ConvTranspose2d),
    over_width: (nn.BatchNorm2d, nn.InstanceNorm2d),
    keep_width: (
        nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
        nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Identity, nn.Dropout, nn.Dropout2d,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid,
    ),
}  # fmt: skip
for _rule, _classes in _TORCH_LAYERS.items():
    for _cls in _classes:
        register(f"nn.{_cls.__name__}", channels=_rule)(_cls)
