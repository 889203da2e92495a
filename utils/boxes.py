"""Boxes as pure functions of arrays. Names carry the format: xyxy corners, cxcywh centre and size; suffix n = divided by the image's size."""
from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)
_EPS = 1e-7


def cxcywh_to_xyxy(boxes: Array) -> Array:
    """(…, 4) centre and size to corners."""
    stack = torch.stack if isinstance(boxes, Tensor) else np.stack
    cx, cy, half_w, half_h = boxes[..., 0], boxes[..., 1], boxes[..., 2] / 2, boxes[..., 3] / 2
    return stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h), -1)


def xyxy_to_cxcywh(boxes: Array) -> Array:
    """(…, 4) corners to centre and size."""
    stack = torch.stack if isinstance(boxes, Tensor) else np.stack
    x1, y1, x2, y2 = boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]
    return stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), -1)


def clip_xyxy(boxes: Array, width: float, height: float) -> Array:
    """(…, 4) corners held inside an image of width x height; a new array."""
    boxes = boxes.clone() if isinstance(boxes, Tensor) else boxes.copy()
    boxes[..., 0::2] = boxes[..., 0::2].clip(0, width)
    boxes[..., 1::2] = boxes[..., 1::2].clip(0, height)
    return boxes


def ciou(a_cxcywh: Tensor, b_cxcywh: Tensor) -> Tensor:
    """Complete IoU of paired boxes, (N, 4) and (N, 4) -> (N,), differentiable (Zheng et al., 2020, eq. 9-11)."""
    a, b = cxcywh_to_xyxy(a_cxcywh), cxcywh_to_xyxy(b_cxcywh)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area_a, area_b = a_cxcywh[:, 2:].prod(1), b_cxcywh[:, 2:].prod(1)
    iou = overlap / (area_a + area_b - overlap + _EPS)

    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    diagonal2 = hull.square().sum(1) + _EPS
    centres2 = (a_cxcywh[:, :2] - b_cxcywh[:, :2]).square().sum(1)
    angle_a = torch.atan(a_cxcywh[:, 2] / (a_cxcywh[:, 3] + _EPS))
    angle_b = torch.atan(b_cxcywh[:, 2] / (b_cxcywh[:, 3] + _EPS))
    aspect = 4 / math.pi**2 * (angle_a - angle_b).square()
    with torch.no_grad():
        alpha = aspect / (1 - iou + aspect + _EPS)
    return iou - centres2 / diagonal2 - alpha * aspect


class Letterbox(NamedTuple):
    """How an image was scaled and padded: `x_padded = x * gain_x + left`, likewise y.

    The gains are of the whole-pixel size that the resize really produced, so that the way back is exact.
    """

    gain_x: float
    gain_y: float
    left: int
    top: int
    width: int  # of the original, pixels
    height: int

    def forward(self, xyxy: Array) -> Array:
        """Corners in the original image's pixels to the padded image's."""
        return xyxy * self._gain(xyxy) + self._offset(xyxy)

    def back(self, xyxy: Array) -> Array:
        """Corners in the padded image's pixels to the original's, clipped to it."""
        return clip_xyxy((xyxy - self._offset(xyxy)) / self._gain(xyxy), self.width, self.height)

    def _gain(self, like: Array) -> Array:
        return _like(like, (self.gain_x, self.gain_y, self.gain_x, self.gain_y))

    def _offset(self, like: Array) -> Array:
        return _like(like, (self.left, self.top, self.left, self.top))


def _like(array: Array, values: tuple[float, ...]) -> Array:
    return array.new_tensor(values) if isinstance(array, Tensor) else np.asarray(values, array.dtype)


def centre_in(size: tuple[int, int], scaled: tuple[int, int], target: tuple[int, int]) -> Letterbox:
    """The geometry of an image of `size`, resized to `scaled` and centred in `target`; each (width, height)."""
    (width, height), (new_w, new_h), (target_w, target_h) = size, scaled, target
    return Letterbox(new_w / width, new_h / height, (target_w - new_w) // 2, (target_h - new_h) // 2, width, height)


def scaled_to(size: tuple[int, int], longer_side: int) -> tuple[int, int]:
    """`size` (width, height) with its longer side brought to `longer_side` and its aspect kept, rounded up to whole pixels."""
    return -(-size[0] * longer_side // max(size)), -(-size[1] * longer_side // max(size))
