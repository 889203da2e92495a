"""What a detector found on one image: drawn, cropped, counted."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.draw import draw_boxes, palette
from utils.evaluate.matching import Detections


class Style(NamedTuple):
    """How boxes are drawn."""

    line_width: int | None = None  # pixels; None: by the image's size
    labels: bool = True
    conf: bool = True


DEFAULT_STYLE = Style()


class Result(NamedTuple):
    """The boxes of one image, best first."""

    image: np.ndarray  # (H, W, 3) uint8 BGR, as given
    found: Detections  # in the image's pixels
    names: Sequence[str]  # of all classes
    inference_ms: float = 0.0  # letterbox, network and decoding
    nms_ms: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image, pixels."""
        return self.image.shape[1], self.image.shape[0]

    def drawn(self, style: Style = DEFAULT_STYLE) -> np.ndarray:
        """A copy of the image with its boxes; the image itself where there are none."""
        if not len(self.found.cls):
            return self.image
        labels = [self._label(int(c), conf, style) for c, conf in zip(self.found.cls, self.found.conf, strict=True)]
        return draw_boxes(self.image, self.found.xyxy, labels, [palette(int(c)) for c in self.found.cls], style.line_width)

    def crops(self) -> list[np.ndarray]:
        """Each box's part of the image, whole pixels that hold the box; at least one pixel."""
        width, height = self.size
        crops = []
        for x1, y1, x2, y2 in self.found.xyxy.tolist():
            left, top = min(int(x1), width - 1), min(int(y1), height - 1)
            crops.append(self.image[top : max(math.ceil(y2), top + 1), left : max(math.ceil(x2), left + 1)])
        return crops

    def _label(self, cls: int, conf: float, style: Style) -> str:
        if not style.labels:
            return ""
        return f"{self.names[cls]} {conf:.2f}" if style.conf else self.names[cls]


class Tally:
    """Images, boxes and time of a run, summed as results come in."""

    def __init__(self, names: Sequence[str], at_once: int = 1) -> None:
        self.names = names
        self.at_once = at_once  # images under way together, so that a second holds more of them than its milliseconds say
        self.images = 0
        self.seconds = 0.0  # from first to last, overlap and all
        self.load_ms = self.inference_ms = self.nms_ms = 0.0  # sums
        self._of_class = np.zeros((len(names), 2), np.int64)  # images, boxes

    def add(self, result: Result, load_ms: float) -> None:
        self.images += 1
        self.load_ms += load_ms
        self.inference_ms += result.inference_ms
        self.nms_ms += result.nms_ms
        boxes = np.bincount(result.found.cls, minlength=len(self.names))
        self._of_class += np.stack((boxes > 0, boxes), 1)

    @property
    def boxes(self) -> int:
        return int(self._of_class[:, 1].sum())

    def table(self) -> str:
        """A line for each class that was found, most boxes first."""
        found = [k for k in np.argsort(-self._of_class[:, 1], kind="stable") if self._of_class[k, 1]]
        width = max([8, *(len(self.names[k]) for k in found)])
        lines = [f"{'class':>{width}}  {'images':>7}  {'boxes':>8}", f"{'all':>{width}}  {self.images:>7}  {self.boxes:>8}"]
        lines += [f"{self.names[k]:>{width}}  {self._of_class[k, 0]:>7}  {self._of_class[k, 1]:>8}" for k in found]
        return "\n".join(lines)
