"""What a detector found on one image: drawn, cropped, counted, and handed to other programs."""
from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.draw import draw_boxes, palette, save_image
from utils.evaluate.matching import Detections
from utils.extras import import_extra

if TYPE_CHECKING:
    import pandas
    import supervision


class Style(NamedTuple):
    """How boxes are drawn."""

    line_width: int | None = None  # pixels; None: by the image's size
    labels: bool = True
    conf: bool = True


DEFAULT_STYLE = Style()


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The boxes of one image, best first; as long as there are boxes.

    Attributes:
        image: (H, W, 3) uint8 BGR, as the network's user gave it.
        found: in the image's pixels.
        names: of all classes.
        inference_ms: letterbox, network and decoding.
        path: the image's file; empty where it came from none.
    """

    image: np.ndarray
    found: Detections
    names: Sequence[str]
    inference_ms: float = 0.0
    nms_ms: float = 0.0
    path: str = ""

    def __len__(self) -> int:
        return len(self.found.cls)

    def __repr__(self) -> str:
        width, height = self.size
        return f"<Result {self.path or 'image'}: {width}x{height}, {self.counted}>"

    @property
    def counted(self) -> str:
        """`4 persons, 1 bus`, in the order of first appearance."""
        counts = Counter(self.labels).items()
        return ", ".join(f"{count} {name}{'s' * (count > 1 and not name.endswith('s'))}" for name, count in counts) or "(no detections)"

    @property
    def xyxy(self) -> np.ndarray:
        """(n, 4) float64, corners in the image's pixels."""
        return self.found.xyxy

    @property
    def conf(self) -> np.ndarray:
        """(n,) float64, falling."""
        return self.found.conf

    @property
    def cls(self) -> np.ndarray:
        """(n,) int64, indices of `names`."""
        return self.found.cls

    @property
    def labels(self) -> list[str]:
        """n class names."""
        return [self.names[c] for c in self.cls]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image, pixels."""
        return self.image.shape[1], self.image.shape[0]

    def plot(self, line_width: int | None = None, labels: bool = True, conf: bool = True) -> np.ndarray:
        """A copy of the image, BGR, with its boxes.

        Args:
            line_width: pixels; None: by the image's size.
            labels: class names, with `conf` their confidences too.
        """
        texts = [(f"{name} {c:.2f}" if conf else name) if labels else "" for name, c in zip(self.labels, self.conf, strict=True)]
        return draw_boxes(self.image, self.xyxy, texts, [palette(int(c)) for c in self.cls], line_width)

    def save(self, path: str | Path, line_width: int | None = None, labels: bool = True, conf: bool = True) -> Path:
        """Write `plot` to a file, in the format that its suffix says; missing folders are made.

        Raises:
            UserError: OpenCV can't write that format.
        """
        path = Path(path).expanduser()
        save_image(path, self.plot(line_width, labels, conf))
        return path

    def crop(self) -> list[np.ndarray]:
        """Each box's part of the image, whole pixels that hold the box; at least one pixel. Views: copy one to draw on it."""
        width, height = self.size
        crops = []
        for x1, y1, x2, y2 in self.xyxy.tolist():
            left, top = min(int(x1), width - 1), min(int(y1), height - 1)
            crops.append(self.image[top : max(math.ceil(y2), top + 1), left : max(math.ceil(x2), left + 1)])
        return crops

    def to_dict(self) -> dict[str, Any]:
        """Plain data: path, width, height, and of each box class, name, confidence and xyxy."""
        columns = zip(self.cls.tolist(), self.labels, self.conf.tolist(), self.xyxy.tolist(), strict=True)
        boxes = [{"class": c, "name": name, "confidence": conf, "xyxy": xyxy} for c, name, conf, xyxy in columns]
        width, height = self.size
        return {"path": self.path, "width": width, "height": height, "boxes": boxes}

    def to_json(self) -> str:
        """`to_dict` on one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def pandas(self) -> pandas.DataFrame:
        """A row for each box: xmin, ymin, xmax, ymax, confidence, class, name.

        Raises:
            UserError: pandas is not installed.
        """
        return table(self, self.xyxy, ("xmin", "ymin", "xmax", "ymax"))

    def supervision(self) -> supervision.Detections:
        """The boxes for supervision's trackers, annotators and metrics.

        Raises:
            UserError: supervision is not installed.
        """
        names = np.array(self.labels, dtype=str)
        return import_extra("supervision").Detections(self.xyxy.astype(np.float32), confidence=self.conf.astype(np.float32), class_id=self.cls,
                                                      data={"class_name": names})


def table(result: Result, boxes: np.ndarray, columns: Sequence[str]) -> pandas.DataFrame:
    """A row for each of the result's boxes: `boxes` (n, 4) in any form under the names of `columns`, then confidence, class, name."""
    values = dict(zip(columns, boxes.T, strict=True)) | {"confidence": result.conf, "class": result.cls}
    pandas = import_extra("pandas")
    return pandas.DataFrame(values).assign(name=pandas.Series(result.labels, dtype="str"))  # text where there is none, too


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
