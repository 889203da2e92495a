"""PP-LCNet (Cui et al., 2021): depthwise separable convolutions with hard swish, made for CPUs. Its stem is MobileNetV3's, `MobileStem`."""
from __future__ import annotations

from torch import Tensor, nn

from models.bneck import check_bneck
from models.layers import SE, same_padding
from models.registry import register, to_width


@register("DepthSepConv", channels=to_width)
class DepthSepConv(nn.Module):
    """Depthwise k x k, SE if `se` gives its ratio, 1x1; batch norm and hard swish after both convolutions. (B, c1, H, W) -> (B, c2, H/s, W/s).

    The paper's sections 3.1 to 3.3: 5x5 kernels in the last stages, SE in the last two blocks. Member names are those of timm's weights.

    Raises:
        ValueError: an even kernel, a stride other than 1 and 2, or a ratio outside 0..1.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, se: float = 0.0) -> None:
        super().__init__()
        check_bneck(k, s, se)
        self.conv_dw = nn.Conv2d(c1, c1, k, s, same_padding(k), groups=c1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.se = SE(c1, se) if se else nn.Identity()
        self.conv_pw = nn.Conv2d(c1, c2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c2)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv_dw(x)))
        return self.act(self.bn2(self.conv_pw(self.se(x))))
