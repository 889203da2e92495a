"""GhostNetV2 (Tang et al., NeurIPS 2022): Ghost modules under decoupled fully connected (DFC) attention, which looks along rows and columns.

Member names are those of the published ImageNet weights.
"""
from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.bneck import bneck_of_4, to_width_of_4
from models.ghost import GhostFrame, GhostModule
from models.layers import conv_bn
from models.registry import register


@register("GhostModuleV2", channels=to_width_of_4)
class GhostModuleV2(GhostModule):
    """A Ghost module times its DFC attention (section 4). (B, c1, H, W) -> (B, c2, H/s, W/s).

    The attention is worked out at half the resolution: mean of 2x2, convolution, depthwise 1x5 and 5x1, sigmoid, nearest upsampling.
    """

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, ratio: int = 2, dw_size: int = 3) -> None:
        super().__init__(c1, c2, k, s, ratio=ratio, dw_size=dw_size)
        self.short_conv = nn.Sequential(
            *conv_bn(c1, c2, k, s), *conv_bn(c2, c2, (1, 5), g=c2), *conv_bn(c2, c2, (5, 1), g=c2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        height, width = x.shape[2:]
        halved = F.avg_pool2d(x, (min(int(height), 2), min(int(width), 2)))  # P5 of a 32 px side is one cell; converters want constants
        gate = self.short_conv(halved).sigmoid()
        return y * F.interpolate(gate, size=y.shape[2:])


@register("GBneckV2", channels=bneck_of_4)
class GBneckV2(GhostFrame):
    """GhostNetV2's bottleneck: attention on the module that widens. (B, c1, H, W) -> (B, c2, H/s, W/s).

    The paper's first two bottlenecks are plain GBnecks.
    """

    def __init__(
        self, c1: int, c2: int, k: int, expansion: int, se: float = 0.0, s: int = 1, ratio: int = 2, dw_size: int = 3
    ) -> None:
        first = partial(GhostModuleV2, ratio=ratio, dw_size=dw_size)
        second = partial(GhostModule, relu=False, ratio=ratio, dw_size=dw_size)
        super().__init__(c1, c2, k, expansion, se, s, first, second)
