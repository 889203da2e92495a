"""Non-maximum suppression: an image's decoded predictions -> the boxes to keep. No torch, so that every runtime's boxes are settled here."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from utils.boxes import cxcywh_to_xyxy

_MAX_CANDIDATES = 30_000  # of one image, best first: bounds the work on an untrained network's noise
_STEP = 4  # candidates decided at a time for each box that may be kept
_CLASS_SHIFT_PX = 2.0**24  # farther than any box reaches, so that boxes of two classes never overlap; exact in float64
_LEAST_AREA_PX2 = 1e-12


@dataclass(frozen=True)
class NmsOptions:
    """Which boxes remain; the defaults are detection's.

    Attributes:
        multi_label: count a box once for each class above the threshold (validation) instead of for its best class (detection).
        agnostic: boxes suppress each other across classes.
        classes: keep these classes only.
        max_det: boxes of one image.
    """

    conf_thres: float = 0.25
    iou_thres: float = 0.45
    multi_label: bool = False
    agnostic: bool = False
    classes: Sequence[int] | None = None
    max_det: int = 1000

    def with_one_class(self) -> NmsOptions:
        """As where every box counts as the same class."""
        return replace(self, multi_label=False, agnostic=True)


VALIDATION = NmsOptions(conf_thres=0.001, iou_thres=0.6, multi_label=True, max_det=300)


def non_max_suppression(predictions: np.ndarray, options: NmsOptions) -> np.ndarray:
    """(N, 5 + C) float of cx, cy, w, h, objectness, class probabilities -> (n, 6) float: x1, y1, x2, y2, confidence, class; best first.

    Of equal confidences the earlier prediction comes first; a box that is not finite, or whose confidence is no number, is left out; one
    without area overlaps none.
    """
    rows = predictions[predictions[:, 4] > options.conf_thres]  # before any product or sort, as no confidence exceeds the objectness
    rows = rows[np.isfinite(rows[:, :4]).all(1)]
    conf, cls, row = _candidates(rows, options)
    return _suppress(cxcywh_to_xyxy(rows[:, :4])[row], conf, cls, options)


def _candidates(rows: np.ndarray, options: NmsOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (n, 5 + C) whose objectness passes -> confidence, class and row (m,) of each candidate, best first."""
    scores = rows[:, 5:] * rows[:, 4:5]
    if options.multi_label and scores.shape[1] > 1:
        index = np.flatnonzero(scores > options.conf_thres)
        conf, (row, cls) = scores.ravel()[index], divmod(index, scores.shape[1])
    else:
        cls = scores.argmax(1)
        conf = scores[np.arange(len(rows)), cls]
        row = np.flatnonzero(conf > options.conf_thres)
        conf, cls = conf[row], cls[row]
    if options.classes is not None:
        chosen = np.isin(cls, options.classes)
        conf, cls, row = conf[chosen], cls[chosen], row[chosen]
    if len(conf) > _MAX_CANDIDATES:
        best = conf >= np.partition(conf, -_MAX_CANDIDATES)[-_MAX_CANDIDATES]
        conf, cls, row = conf[best], cls[best], row[best]
    order = np.argsort(-conf, kind="stable")[:_MAX_CANDIDATES]
    return conf[order], cls[order], row[order]


def _suppress(xyxy: np.ndarray, conf: np.ndarray, cls: np.ndarray, options: NmsOptions) -> np.ndarray:
    """The boxes that remain of candidates sorted best first.

    They are decided from the best down, some at a time beside those kept so far, so that the many after the last box wanted cost nothing.
    The greedy loop is OpenCV's: as fast as torchvision's (benchmarks/nms.py), which would bring PyTorch along.
    """
    xywh = xyxy.astype(np.float64)
    xywh[:, 2:] -= xywh[:, :2]
    if not options.agnostic:
        xywh[:, 0] += cls * _CLASS_SHIFT_PX
    empty = np.flatnonzero(xywh[:, 2] * xywh[:, 3] < _LEAST_AREA_PX2)  # they overlap none; OpenCV takes any two of them for one
    xywh[empty, 1], xywh[empty, 2:] = np.arange(1, len(empty) + 1) * -_CLASS_SHIFT_PX, 1
    step = max(_STEP * options.max_det, 1024)
    keep = np.empty(0, np.intp)
    for start in range(0, len(conf), step):
        pool = np.concatenate((keep, np.arange(start, min(start + step, len(conf)))))
        # Lists: OpenCV's binding takes three times as long to read arrays.
        keep = pool[cv2.dnn.NMSBoxes(xywh[pool].tolist(), conf[pool].tolist(), 0.0, options.iou_thres)]
        if len(keep) >= options.max_det:
            break
    keep = keep[: options.max_det]
    return np.concatenate((xyxy[keep], conf[keep, None], cls[keep, None]), 1, dtype=conf.dtype)
