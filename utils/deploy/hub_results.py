"""Results as programs written for YOLOv5's torch.hub models read them: one object for all images of a call."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.boxes import xyxy_to_cxcywh
from utils.data.sources import Frame
from utils.deploy.results import Result, Style, table
from utils.deploy.writer import Outputs, ResultWriter
from utils.files import new_run_dir
from utils.log import info

if TYPE_CHECKING:
    import pandas

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_CENTRE = ("xcenter", "ycenter", "width", "height")


class Tables(NamedTuple):
    """A pandas.DataFrame for each image, in each of four forms."""

    xyxy: list[pandas.DataFrame]  # xmin, ymin, xmax, ymax, confidence, class, name
    xyxyn: list[pandas.DataFrame]
    xywh: list[pandas.DataFrame]  # xcenter, ycenter, width, height, confidence, class, name
    xywhn: list[pandas.DataFrame]


class HubResults:
    """What a hub model found, an entry for each image.

    Attributes:
        results: as our own `Detector` gives them.
        names: {number: name} of all classes.
        n: images.
        files: their file names; image0.jpg, image1.jpg … where they came from none.
        ims: (H, W, 3) uint8 RGB each; with their boxes once `render` was called.
        t: milliseconds an image: to pixels, letterbox and network, suppression.
        xyxy, xyxyn, xywh, xywhn: (n, 6) tensors each: corners, or centre and size, in pixels or divided (n) by the image's size; confidence, class.
    """

    def __init__(self, results: Sequence[Result], names: Sequence[str], read_ms: float = 0.0) -> None:
        self.results = list(results)
        self.names = dict(enumerate(names))
        self.n = len(self.results)
        self.files = [Path(r.path).name if r.path else f"image{k}.jpg" for k, r in enumerate(self.results)]
        self.ims = [_to_rgb(r.image) for r in self.results]
        count = max(self.n, 1)
        self.t = (read_ms / count, sum(r.inference_ms for r in self.results) / count, sum(r.nms_ms for r in self.results) / count)
        self.xyxy, self.xyxyn, self.xywh, self.xywhn = ([_tensor(form(r), r) for r in self.results] for form in _FORMS)

    @property
    def imgs(self) -> list[np.ndarray]:
        """`ims`, as earlier releases of YOLOv5 call them."""
        return self.ims

    @imgs.setter
    def imgs(self, images: list[np.ndarray]) -> None:
        self.ims = images

    @property
    def pred(self) -> list[Tensor]:
        """`xyxy`."""
        return self.xyxy

    def __len__(self) -> int:
        return self.n

    def __str__(self) -> str:
        """A line for each image: its size, and how many of which class; then the time."""
        lines = [f"image {k}/{self.n}: {r.image.shape[0]}x{r.image.shape[1]} {r.counted}" for k, r in enumerate(self.results, 1)]
        read, inference, nms = self.t
        return "\n".join([*lines, f"Speed: {read:.1f}ms pre-process, {inference:.1f}ms inference, {nms:.1f}ms NMS per image"])

    __repr__ = __str__  # what a notebook shows

    def print(self) -> None:
        info(str(self))

    def pandas(self) -> Tables:
        """The four forms as tables.

        Raises:
            UserError: pandas is not installed.
        """
        return Tables(*([table(r, form(r), columns) for r in self.results] for form, columns in zip(_FORMS, _COLUMNS, strict=True)))

    def tolist(self) -> list[HubResults]:
        """One object of this kind for each image."""
        names = list(self.names.values())
        return [HubResults([r], names, self.t[0]) for r in self.results]

    def render(self, labels: bool = True) -> list[np.ndarray]:
        """`ims` with the boxes drawn."""
        self.ims = [_to_rgb(r.plot(labels=labels)) for r in self.results]
        return self.ims

    def show(self, labels: bool = True) -> None:
        """Each image with its boxes in the system's viewer, or in the notebook."""
        for image in self.render(labels):
            Image.fromarray(image).show()

    def save(self, labels: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False) -> Path:
        """Write each image with its boxes into a new folder, `save_dir` or the first free of its name and a number; returns it.

        `ims` have the boxes then, too.
        """
        self.render(labels)
        return self._write(save_dir, exist_ok, Outputs(style=Style(labels=labels)))

    def crop(self, save: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False) -> list[dict[str, Any]]:
        """Every box of every image: box (4 tensors), conf, cls, label, and im, its pixels, BGR, as cv2.imwrite takes them.

        Args:
            save: also write them to `save_dir`/crops/CLASS/, of a new folder as `save` makes it.
        """
        if save:
            self._write(save_dir, exist_ok, Outputs(images=False, crops=True))
        return [{"box": list(row[:4]), "conf": row[4], "cls": row[5], "label": f"{self.names[int(row[5])]} {row[4]:.2f}", "im": crop.copy()}
                for rows, r in zip(self.xyxy, self.results, strict=True) for row, crop in zip(rows, r.crop(), strict=True)]

    def _write(self, save_dir: str | Path, exist_ok: bool, outputs: Outputs) -> Path:
        place = Path(save_dir) if Path(save_dir).name else Path(save_dir).absolute()  # "." has none
        folder = new_run_dir(place.parent, place.name, exist_ok)
        with ResultWriter(lambda: folder, outputs) as writer:
            for n, (file, result) in enumerate(zip(self.files, self.results, strict=True)):
                writer.put(Frame(result.path or f"{n}/{file}", 0, result.image, None), result)  # an image without a file has no file's name
        return folder


def _divided(form: Callable[[Result], np.ndarray]) -> Callable[[Result], np.ndarray]:
    return lambda result: form(result) / np.tile(result.size, 2)


def _corners(result: Result) -> np.ndarray:
    return result.xyxy


def _centres(result: Result) -> np.ndarray:
    return xyxy_to_cxcywh(result.xyxy)


_FORMS = (_corners, _divided(_corners), _centres, _divided(_centres))
_COLUMNS = (_CORNERS, _CORNERS, _CENTRE, _CENTRE)


def _tensor(boxes: np.ndarray, result: Result) -> Tensor:
    """(n, 6) float32: boxes, confidence, class."""
    return torch.from_numpy(np.column_stack((boxes, result.conf, result.cls))).float()


def _to_rgb(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
