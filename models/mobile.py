"""Inverted bottlenecks: MobileNetV3's (Howard et al., ICCV 2019), EfficientNet's and EfficientNetV2's (Tan and Le, ICML 2019 and 2021).

Member names are those of torchvision's ImageNet weights. Its own classes are not used: importing them takes as long as importing torch.
"""
from __future__ import annotations

import math

from torch import Tensor, nn

from models.bneck import bneck, check_bneck
from models.layers import Conv, conv_bn, round_to_4
from models.registry import register, to_width

_NONLINEARITIES = {"RE": nn.ReLU, "HS": nn.Hardswish}  # as MobileNetV3's tables name them


@register("MobileStem", channels=to_width)
class MobileStem(Conv):
    """MobileNetV3's first layer: 3x3 convolution of stride 2, batch norm, hard swish."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__(c1, c2, 3, 2, act=nn.Hardswish(inplace=True))


class _Gate(nn.Module):
    """Squeeze-and-excitation with the families' own activations (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, hidden: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = act
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class _Residual(nn.Module):
    """`layers` one after another, plus the input where `same`."""

    def __init__(self, same: bool, *layers: nn.Module) -> None:
        super().__init__()
        self.same = same
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y + x if self.same else y


@register("InvertedResidual", channels=bneck)
class InvertedResidual(_Residual):
    """MobileNetV3's bottleneck (section 5): 1x1 to `expansion` channels, depthwise k x k, SE, 1x1 without activation, plus the input.

    (B, c1, H, W) -> (B, c2, H/s, W/s). The columns of the paper's tables 1 and 2.

    Args:
        se: whether SE, with a quarter of the channels, comes before the last convolution.
        nl: RE for ReLU, HS for hard swish.

    Raises:
        ValueError: an even kernel, a stride other than 1 and 2, or another nl.
    """

    def __init__(self, c1: int, c2: int, k: int, expansion: int, se: bool = False, nl: str = "HS", s: int = 1) -> None:
        check_bneck(k, s)
        if nl not in tuple(_NONLINEARITIES) or se not in (True, False):
            raise ValueError(f"SE is true or false and the nonlinearity RE or HS, not {se!r} and {nl!r}")
        act = _NONLINEARITIES[nl]
        layers = [conv_bn(c1, expansion, act=act)] if expansion != c1 else []
        layers.append(conv_bn(expansion, expansion, k, s, expansion, act))
        if se:
            hidden = 2 * round_to_4(expansion // 4 / 2)  # the nearest multiple of 8
            layers.append(_Gate(expansion, hidden, nn.ReLU(inplace=True), nn.Hardsigmoid()))
        super().__init__(s == 1 and c1 == c2, *layers, conv_bn(expansion, c2))


@register("MBConv", channels=to_width)
class MBConv(_Residual):
    """EfficientNet's bottleneck with SiLU: 1x1 to `expansion` times the channels, depthwise k x k, SE, 1x1, plus the input.

    (B, c1, H, W) -> (B, c2, H/s, W/s). SE's width is a quarter of c1.

    Raises:
        ValueError: an even kernel, a stride other than 1 and 2, or an expansion below 1.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, expansion: float = 4, s: int = 1) -> None:
        check_bneck(k, s)
        hidden = _expanded(c1, expansion)
        super().__init__(
            s == 1 and c1 == c2,
            *([conv_bn(c1, hidden, act=nn.SiLU)] if hidden != c1 else []),
            conv_bn(hidden, hidden, k, s, hidden, nn.SiLU),
            _Gate(hidden, max(c1 // 4, 1), nn.SiLU(inplace=True), nn.Sigmoid()),
            conv_bn(hidden, c2),
        )


@register("FusedMBConv", channels=to_width)
class FusedMBConv(_Residual):
    """EfficientNetV2's bottleneck for its first stages (figure 2): one k x k in place of MBConv's 1x1 and depthwise, no SE.

    (B, c1, H, W) -> (B, c2, H/s, W/s). With expansion 1 the k x k convolution is all.

    Raises:
        ValueError: an even kernel, a stride other than 1 and 2, or an expansion below 1.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, expansion: float = 4, s: int = 1) -> None:
        check_bneck(k, s)
        hidden = _expanded(c1, expansion)
        layers = [conv_bn(c1, c2, k, s, act=nn.SiLU)] if hidden == c1 else [conv_bn(c1, hidden, k, s, act=nn.SiLU), conv_bn(hidden, c2)]
        super().__init__(s == 1 and c1 == c2, *layers)


def _expanded(channels: int, expansion: float) -> int:
    """Rounded up to a multiple of 8, as all widths of a YAML."""
    if isinstance(expansion, bool) or not isinstance(expansion, int | float) or not 1 <= expansion <= 100:
        raise ValueError(f"its expansion is a number from 1 to 100, not {expansion!r}")
    return math.ceil(channels * expansion / 8) * 8
