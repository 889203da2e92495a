"""Test-time augmentation: a network seen as one that looks three times, at three scales, once mirrored."""
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_LOOKS = ((1.0, False), (0.83, True), (0.67, False))  # scale, mirrored left to right
_GREY = 114 / 255


class Augmented:
    """`network` with the boxes of all three looks joined; suppression settles which remain."""

    def __init__(self, network) -> None:
        self.network, self.stride = network, network.max_stride

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> decoded boxes of each look, in the pixels of `images`."""
        return [self._look(images, scale, mirrored) for scale, mirrored in _LOOKS]

    def decode(self, looks: list[Tensor]) -> Tensor:
        return torch.cat(looks, 1)

    def _look(self, images: Tensor, scale: float, mirrored: bool) -> Tensor:
        height, width = images.shape[2:]
        seen = images.flip(3) if mirrored else images
        if scale != 1:
            small = round(height * scale), round(width * scale)
            seen = F.interpolate(seen, small, mode="bilinear", align_corners=False)
            right, bottom = (math.ceil(side * scale / self.stride) * self.stride - s for side, s in ((width, small[1]), (height, small[0])))
            seen = F.pad(seen, (0, right, 0, bottom), value=_GREY)
        boxes = self.network.decode(self.network(seen))
        boxes[..., :4] /= scale
        if mirrored:
            boxes[..., 0] = width - boxes[..., 0]
        return boxes
