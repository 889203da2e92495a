"""Ghost blocks: a convolution makes some of the maps, cheap depthwise filters of them the rest (Han et al., GhostNet, CVPR 2020).

GhostConv, GhostBottleneck and C3Ghost are the YOLOv5 family's (SiLU, ratio 2, 5x5 filters); GhostStem, GhostModule and GBneck are the paper's
(ReLU, 3x3 filters), with the member names of the published ImageNet weights.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.csp import CSPStage
from models.layers import SE, Conv, DWConv, round_to_4, same_padding
from models.registry import Scale, Wiring, one_input, register, to_width


def ghost_widths(c2: int, ratio: int) -> tuple[int, int]:
    """How many maps the primary convolution and the cheap filters make: ceil(c2 / ratio), and ratio - 1 of each.

    Their sum may exceed c2 by up to ratio - 1; the output is cut to c2.

    Raises:
        ValueError: ratio below 2.
    """
    if not isinstance(ratio, int) or ratio < 2:
        raise ValueError(f"ratio is a whole number from 2 on, not {ratio}")
    primary = -(-c2 // ratio)
    return primary, primary * (ratio - 1)


@register("GhostConv", channels=to_width)
class GhostConv(nn.Module):
    """A Conv of which only 1/ratio of the maps are convolved from the input, the others filtered from those maps.

    (B, c1, H, W) -> (B, c2, H/s, W/s). `dw_size` is the cheap filters' side.
    """

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True, ratio: int = 2, dw_size: int = 5) -> None:
        super().__init__()
        primary, cheap = ghost_widths(c2, ratio)
        self.c2 = c2
        self.cv1 = Conv(c1, primary, k, s, g=g, act=act)
        self.cv2 = Conv(primary, cheap, dw_size, g=primary, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)[:, : self.c2]


@register("GhostBottleneck", channels=to_width)
class GhostBottleneck(nn.Module):
    """Two 1x1 GhostConvs, a depthwise k x k between them at stride 2, plus the input. (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, ratio: int = 2, dw_size: int = 5) -> None:
        super().__init__()
        hidden = c2 // 2
        self.conv = nn.Sequential(
            GhostConv(c1, hidden, ratio=ratio, dw_size=dw_size),
            DWConv(hidden, hidden, k, s, act=False) if s > 1 else nn.Identity(),
            GhostConv(hidden, c2, act=False, ratio=ratio, dw_size=dw_size),
        )
        same = s == 1 and c1 == c2
        self.shortcut = nn.Identity() if same else nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


@register("C3Ghost", channels=to_width, repeats="inside")
class C3Ghost(CSPStage):
    """`n` GhostBottlenecks in a CSP stage. `shortcut` and `g` are C3's, so that a YAML can swap one for the other; nothing depends on them here."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, ratio: int = 2, dw_size: int = 5
    ) -> None:
        super().__init__(c1, c2, e, lambda c: nn.Sequential(*(GhostBottleneck(c, c, ratio=ratio, dw_size=dw_size) for _ in range(n))))


def _scale_to_4(width: Any, scale: Scale) -> int:
    """GhostNet's own rounding: `scale` rounds up to multiples of 8, which would widen most of its stages at 0.5x and 1.3x."""
    scale(width)  # refuses what is no width
    fine = 1 << 16  # scale(fine * width) / fine is the unrounded product to 8 / fine channels
    return round_to_4(round(scale(width * fine) / fine, 2))


def _to_width_of_4(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    if not args:
        raise ValueError("needs its output channels as first argument")
    c2 = _scale_to_4(args[0], scale)
    return Wiring([one_input(inputs), c2, *args[1:]], c2)


def _gbneck(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    if len(args) < 3:
        raise ValueError("needs [output channels, kernel, expansion channels, se ratio, stride]")
    c2, expansion = _scale_to_4(args[0], scale), _scale_to_4(args[2], scale)
    return Wiring([one_input(inputs), c2, args[1], expansion, *args[3:]], c2)


@register("GhostStem", channels=_to_width_of_4)
class GhostStem(Conv):
    """GhostNet's first layer: 3x3 convolution of stride 2, batch norm, ReLU."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__(c1, c2, 3, 2, act=nn.ReLU(inplace=True))


@register("GhostModule", channels=_to_width_of_4)
class GhostModule(nn.Module):
    """The paper's Ghost module (section 3.1). (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, relu: bool = True, ratio: int = 2, dw_size: int = 3) -> None:
        super().__init__()
        primary, cheap = ghost_widths(c2, ratio)
        self.c2 = c2
        self.primary_conv = _conv_bn(c1, primary, k, s, 1, relu)
        self.cheap_operation = _conv_bn(primary, cheap, dw_size, 1, primary, relu)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_conv(x)
        return torch.cat((y, self.cheap_operation(y)), 1)[:, : self.c2]


def _conv_bn(c1: int, c2: int, k: int, s: int, g: int, relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(c1, c2, k, s, same_padding(k), groups=g, bias=False), nn.BatchNorm2d(c2)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


@register("GBneck", channels=_gbneck)
class GBneck(nn.Module):
    """The paper's Ghost bottleneck (section 3.2, figure 3): widen, at stride 2 a depthwise convolution, SE, narrow without ReLU, plus the input.

    (B, c1, H, W) -> (B, c2, H/s, W/s).

    Args:
        expansion: channels between the two Ghost modules.
        se: SE's reduction ratio, 0 for none.
    """

    def __init__(
        self, c1: int, c2: int, k: int, expansion: int, se: float = 0.0, s: int = 1, ratio: int = 2, dw_size: int = 3
    ) -> None:
        super().__init__()
        self.ghost1 = GhostModule(c1, expansion, ratio=ratio, dw_size=dw_size)
        self.conv_dw = nn.Conv2d(expansion, expansion, k, s, same_padding(k), groups=expansion, bias=False) if s > 1 else nn.Identity()
        self.bn_dw = nn.BatchNorm2d(expansion) if s > 1 else nn.Identity()
        self.se = SE(expansion, se) if se else nn.Identity()
        self.ghost2 = GhostModule(expansion, c2, relu=False, ratio=ratio, dw_size=dw_size)
        same = s == 1 and c1 == c2
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(c1, c1, k, s, c1, False), *_conv_bn(c1, c2, 1, 1, 1, False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_dw(self.conv_dw(self.ghost1(x)))
        return self.ghost2(self.se(y)) + self.shortcut(x)
