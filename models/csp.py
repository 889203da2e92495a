"""Cross-stage-partial blocks: half the channels go through bottlenecks, half around them (Wang et al., CSPNet, CVPRW 2020)."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.layers import SPP, Conv, activation
from models.registry import register, to_width


@register("Bottleneck", channels=to_width)
class Bottleneck(nn.Module):
    """1x1 to `e * c2` channels, 3x3 to c2, plus the input where `shortcut` and the widths agree (He et al., CVPR 2016)."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(hidden, c2, 3, g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register("CrossConv", channels=to_width)
class CrossConv(nn.Module):
    """A k x k convolution as 1 x k and k x 1, plus the input where `shortcut` and the shapes agree (Szegedy et al., CVPR 2016, section 3.2)."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, (1, k), (1, s))
        self.cv2 = Conv(hidden, c2, (k, 1), (s, 1), g=g)
        self.add = shortcut and c1 == c2 and s == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register("BottleneckCSP", channels=to_width, repeats="inside")
class BottleneckCSP(nn.Module):
    """The CSP stage as its paper draws it: a transition after the bottlenecks, one batch norm over both halves."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = nn.Conv2d(c1, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c2)
        self.bn = nn.BatchNorm2d(2 * hidden)
        self.act = activation(True)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, 1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1)
        return self.cv4(self.act(self.bn(halves)))


class CSPStage(nn.Module):
    """CSP with three convolutions: cv3(concat(m(cv1(x)), cv2(x))).

    Args:
        e: width of each half relative to c2.
        make: builds `m` of the half's width.
    """

    def __init__(self, c1: int, c2: int, e: float, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.cv3 = Conv(2 * hidden, c2)
        self.m = make(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@register("C3", channels=to_width, repeats="inside")
class C3(CSPStage):
    """`n` bottlenecks in a CSP stage."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__(c1, c2, e, lambda c: nn.Sequential(*(Bottleneck(c, c, shortcut, g, 1.0) for _ in range(n))))


@register("C3x", channels=to_width, repeats="inside")
class C3x(CSPStage):
    """`n` CrossConvs in a CSP stage."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__(c1, c2, e, lambda c: nn.Sequential(*(CrossConv(c, c, 3, 1, g, 1.0, shortcut) for _ in range(n))))


@register("C3SPP", channels=to_width, repeats="inside")
class C3SPP(CSPStage):
    """`n` spatial pyramids in a CSP stage.

    Args:
        k: the pools' sizes; in a C3 row that was made a C3SPP one its shortcut stands there, which a pyramid has not, nor groups, which follow it.
        c3_e: e in such a row.

    Raises:
        ValueError: a fourth argument after sizes and e.
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, k: Sequence[int] | bool = (5, 9, 13), e: float = 0.5, c3_e: float | None = None
    ) -> None:
        if isinstance(k, bool):
            k, e = (5, 9, 13), c3_e if c3_e is not None else e if e < 1 else 0.5  # 1 and more are groups
        elif c3_e is not None:
            raise ValueError(f"takes channels, sizes of pools and e, found {c3_e:g} besides")
        super().__init__(c1, c2, e, lambda c: nn.Sequential(*(SPP(c, c, k) for _ in range(n))))


@register("C3TR", channels=to_width, repeats="inside")
class C3TR(CSPStage):
    """`n` transformer encoder layers over all positions in a CSP stage (TPH-YOLOv5, ICCVW 2021).

    Args:
        shortcut, g: of the C3 row that was made a C3TR one; attention has shortcuts of its own.
        heads: in a row by name: `[1024, {heads: 8}]`.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, heads: int = 4) -> None:
        if not isinstance(shortcut, bool):
            raise ValueError("the second number is C3's shortcut, true or false; heads are given by name, {heads: 8}")
        super().__init__(c1, c2, e, lambda c: TransformerBlock(c, heads, n))


class TransformerBlock(nn.Module):
    """Encoder layers over the H * W positions as tokens. (B, C, H, W) -> the same.

    Positions come from a depthwise 3x3 convolution with zero padding, so that any image size works
    (Chu et al., Conditional Positional Encodings, ICLR 2023).
    """

    def __init__(self, channels: int, heads: int, n: int) -> None:
        super().__init__()
        self.position = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.layers = nn.Sequential(*(TransformerLayer(channels, heads) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x + self.position(x)).flatten(2).transpose(1, 2)  # (B, H * W, C)
        return self.layers(tokens).transpose(1, 2).reshape(x.shape)


class TransformerLayer(nn.Module):
    """Pre-norm encoder layer (Dosovitskiy et al., ViT, ICLR 2021, equations 2 and 3). (B, N, C) -> the same."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))
