"""Boxes as pure functions of arrays, NumPy's or PyTorch's.

Names carry the format: xyxy corners, cxcywh centre and size; suffix n = divided by the image's size.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")


def cxcywh_to_xyxy(boxes: Array) -> Array:
    """(…, 4) centre and size to corners."""
    cx, cy, half_w, half_h = boxes[..., 0], boxes[..., 1], boxes[..., 2] / 2, boxes[..., 3] / 2
    return _stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h))


def xyxy_to_cxcywh(boxes: Array) -> Array:
    """(…, 4) corners to centre and size."""
    x1, y1, x2, y2 = boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]
    return _stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1))


def clip_xyxy(boxes: Array, width: float, height: float) -> Array:
    """(…, 4) corners held inside an image of width x height; a new array."""
    boxes = boxes.copy() if isinstance(boxes, np.ndarray) else boxes.clone()
    boxes[..., 0::2] = boxes[..., 0::2].clip(0, width)
    boxes[..., 1::2] = boxes[..., 1::2].clip(0, height)
    return boxes


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
    return np.asarray(values, array.dtype) if isinstance(array, np.ndarray) else array.new_tensor(values)


def _stack(columns: tuple[Array, ...]) -> Array:
    if isinstance(columns[0], np.ndarray | np.generic):
        return np.stack(columns, -1)
    import torch  # whoever has a tensor has imported it

    return torch.stack(columns, -1)


def centre_in(size: tuple[int, int], scaled: tuple[int, int], target: tuple[int, int]) -> Letterbox:
    """The geometry of an image of `size`, resized to `scaled` and centred in `target`; each (width, height)."""
    (width, height), (new_w, new_h), (target_w, target_h) = size, scaled, target
    return Letterbox(new_w / width, new_h / height, (target_w - new_w) // 2, (target_h - new_h) // 2, width, height)


def fitted(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """`size` (width, height) as it fits into `frame` (height, width), its aspect kept."""
    width, height = size
    return scaled_to(size, min(frame[0] * max(size) // height, frame[1] * max(size) // width))


def scaled_to(size: tuple[int, int], longer_side: int) -> tuple[int, int]:
    """`size` (width, height) with its longer side brought to `longer_side` and its aspect kept, rounded up to whole pixels."""
    return -(-size[0] * longer_side // max(size)), -(-size[1] * longer_side // max(size))
