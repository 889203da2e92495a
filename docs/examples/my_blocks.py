"""A block of one's own: FasterNet's partial convolution (Chen et al., CVPR 2023)."""
import torch
from torch import nn

from models.common import Conv
from models.registry import register, to_width


@register("FasterBlock", channels=to_width)
class FasterBlock(nn.Module):
    """3x3 over a share of the channels, the others as they are; then two 1x1 over all of them, plus the input. (B, c1, H, W) -> (B, c2, H, W)."""

    def __init__(self, c1, c2, share=0.25):
        super().__init__()
        self.worked = int(c1 * share)
        self.spatial = nn.Conv2d(self.worked, self.worked, 3, padding=1, bias=False)
        self.mix = nn.Sequential(Conv(c1, 2 * c2), nn.Conv2d(2 * c2, c2, 1))
        self.add = c1 == c2

    def forward(self, x):
        y = self.mix(torch.cat((self.spatial(x[:, : self.worked]), x[:, self.worked :]), 1))
        return x + y if self.add else y
