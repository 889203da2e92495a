"""Precision, recall and F1 against confidence, and precision against recall, from COCO's assignment at one IoU."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluate.coco import RECALL, precision_at_recall
from utils.evaluate.matching import Detections, Truth, match

CONFIDENCE = np.linspace(0, 1, 1000)
_SMOOTHING = 51  # points of CONFIDENCE, about 0.05


@dataclass(frozen=True)
class Curves:
    """Curves of C classes; the rows of classes without truth are nan."""

    conf: np.ndarray  # (1000,) 0 … 1; a detection counts from its confidence down
    precision: np.ndarray  # (C, 1000); 1 above a class's highest confidence (nothing said, nothing wrong), 0 where it was never detected
    recall: np.ndarray  # (C, 1000)
    f1: np.ndarray  # (C, 1000)
    pr_recall: np.ndarray  # (101,) COCO's recalls
    pr_precision: np.ndarray  # (C, 101) interpolated as COCO does
    ap50: np.ndarray  # (C,) mean of pr_precision: at IoU 0.5 COCO's AP50
    classes: np.ndarray  # (K,) indices of the classes that have truth
    best_conf: float  # where the classes' mean F1, smoothed, is highest
    precision_at_best: np.ndarray  # (C,)
    recall_at_best: np.ndarray  # (C,)
    f1_at_best: np.ndarray  # (C,)

    def mean(self, per_class: np.ndarray) -> np.ndarray | float:
        """(C, …) -> (…), over the classes that have truth; 0 where none has."""
        return per_class[self.classes].mean(0) if len(self.classes) else np.zeros(per_class.shape[1:])[()]


def curves(truths: Sequence[Truth], detections: Sequence[Detections], num_classes: int, iou: float = 0.5) -> Curves:
    """The curves of a data set.

    COCO's greedy rule at one IoU: in falling confidence each detection takes the best free truth of its image and class. Because of that order,
    the assignment at a higher confidence threshold is the same, cut off: one pass serves all thresholds. What matches only a crowd is left out.
    Precision against recall stops at COCO's 100 detections of a class on an image, as mAP does; the curves against confidence count all.
    """
    matches = match(truths, detections, np.array([iou]))
    everything = match(truths, detections, np.array([iou]), most=None) if len(matches.conf) < sum(len(d.cls) for d in detections) else matches
    precision, recall = np.full((2, num_classes, len(CONFIDENCE)), np.nan)
    pr_precision = np.full((num_classes, len(RECALL)), np.nan)
    for k in range(num_classes):
        conf, right, wrong, (positives,) = matches.of_class(k)
        if positives:
            pr_precision[k] = precision_at_recall(right[0], wrong[0], positives)[0]
            conf, right, wrong, _ = everything.of_class(k)
            hits, misses = (np.append(0, flags[0, 0].cumsum())[len(conf) - np.searchsorted(conf[::-1], CONFIDENCE)] for flags in (right, wrong))
            nothing = 1.0 if (right | wrong).any() else 0.0
            precision[k] = np.where(hits + misses > 0, hits / np.maximum(hits + misses, 1), nothing)
            recall[k] = hits / positives

    f1 = 2 * precision * recall / np.maximum(precision + recall, np.spacing(1))
    classes = np.flatnonzero(~np.isnan(pr_precision[:, 0]))
    best = int(_smooth(f1[classes].mean(0)).argmax()) if len(classes) else 0
    return Curves(
        CONFIDENCE, precision, recall, f1, RECALL, pr_precision, pr_precision.mean(1),
        classes, float(CONFIDENCE[best]), precision[:, best], recall[:, best], f1[:, best],
    )  # fmt: skip


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average of (N,) whose ends repeat."""
    padded = np.pad(values, _SMOOTHING // 2, mode="edge")
    return np.convolve(padded, np.full(_SMOOTHING, 1 / _SMOOTHING), mode="valid")
