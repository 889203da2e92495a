"""Ghost blocks: a convolution makes some of the maps, cheap depthwise filters of them the rest (Han et al., GhostNet, CVPR 2020).

GhostConv, GhostBottleneck and C3Ghost are the YOLOv5 family's (SiLU, ratio 2, 5x5 filters); GhostStem, GhostModule and GBneck are the paper's
(ReLU, 3x3 filters), with the member names of the published ImageNet weights.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from models.bneck import bneck_of_4, check_bneck, to_width_of_4
from models.csp import CSPStage
from models.layers import SE, Conv, DWConv, conv_bn, same_padding
from models.registry import register, to_width

MakeModule = Callable[[int, int], nn.Module]  # of input and output channels


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


@register("GhostStem", channels=to_width_of_4)
class GhostStem(Conv):
    """GhostNet's first layer: 3x3 convolution of stride 2, batch norm, ReLU."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__(c1, c2, 3, 2, act=nn.ReLU(inplace=True))


@register("GhostModule", channels=to_width_of_4)
class GhostModule(nn.Module):
    """The paper's Ghost module (section 3.1). (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, relu: bool = True, ratio: int = 2, dw_size: int = 3) -> None:
        super().__init__()
        primary, cheap = ghost_widths(c2, ratio)
        act = nn.ReLU if relu else None
        self.c2 = c2
        self.primary_conv = conv_bn(c1, primary, k, s, act=act)
        self.cheap_operation = conv_bn(primary, cheap, dw_size, g=primary, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_conv(x)
        return torch.cat((y, self.cheap_operation(y)), 1)[:, : self.c2]


class GhostFrame(nn.Module):
    """The paper's Ghost bottleneck (section 3.2, figure 3) around any two modules.

    Widen, at stride 2 a depthwise convolution, SE, narrow, plus the input. (B, c1, H, W) -> (B, c2, H/s, W/s).

    Args:
        expansion: channels between the two modules.
        se: SE's reduction ratio, 0 for none.
        first: makes the module that widens, of its input and output channels.
        second: makes the module that narrows.

    Raises:
        ValueError: an even kernel, a stride other than 1 and 2, or a ratio outside 0..1.
    """

    def __init__(self, c1: int, c2: int, k: int, expansion: int, se: float, s: int, first: MakeModule, second: MakeModule) -> None:
        super().__init__()
        check_bneck(k, s, se)
        self.ghost1 = first(c1, expansion)
        self.conv_dw = nn.Conv2d(expansion, expansion, k, s, same_padding(k), groups=expansion, bias=False) if s > 1 else nn.Identity()
        self.bn_dw = nn.BatchNorm2d(expansion) if s > 1 else nn.Identity()
        self.se = SE(expansion, se) if se else nn.Identity()
        self.ghost2 = second(expansion, c2)
        same = s == 1 and c1 == c2
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(c1, c1, k, s, c1), *conv_bn(c1, c2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_dw(self.conv_dw(self.ghost1(x)))
        return self.ghost2(self.se(y)) + self.shortcut(x)


@register("GBneck", channels=bneck_of_4)
class GBneck(GhostFrame):
    """GhostNet's bottleneck: two 1x1 Ghost modules, the second without ReLU. (B, c1, H, W) -> (B, c2, H/s, W/s)."""

    def __init__(
        self, c1: int, c2: int, k: int, expansion: int, se: float = 0.0, s: int = 1, ratio: int = 2, dw_size: int = 3
    ) -> None:
        module = partial(GhostModule, ratio=ratio, dw_size=dw_size)
        super().__init__(c1, c2, k, expansion, se, s, module, partial(module, relu=False))
