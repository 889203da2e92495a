"""COCO's average precision and recall of boxes, equal to pycocotools' COCOeval on the same boxes (tests/test_evaluate_coco.py)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluate.matching import ALL_SIZES, Detections, Truth, match

__all__ = ["RECALL", "CocoScores", "Detections", "Truth", "coco_scores", "precision_at_recall"]

IOU = np.linspace(0.5, 0.95, 10)
RECALL = np.linspace(0, 1, 101)
SIZES = np.concatenate((ALL_SIZES, [[0, 32**2], [32**2, 96**2], [96**2, 1e5**2]]))  # px^2: all, small, medium, large
_EPS = np.spacing(1)


@dataclass(frozen=True)
class CocoScores:
    """COCO's figures, 0 to 1; nan where no truth is there to score (pycocotools writes -1)."""

    ap: float  # mAP50-95
    ap50: float
    ap75: float
    ap_small: float  # truths up to 32^2 px
    ap_medium: float  # up to 96^2
    ap_large: float
    ar: float  # mean recall over classes and IoU thresholds, 100 detections of a class on an image
    per_class_ap: np.ndarray  # (C,)
    per_class_ap50: np.ndarray  # (C,)


def coco_scores(truths: Sequence[Truth], detections: Sequence[Detections], num_classes: int) -> CocoScores:
    """Score the detections of a data set.

    Args:
        truths: one for each image; an image without objects has empty arrays.
        detections: of the same images, in the same order.
        num_classes: classes outside of 0 … num_classes - 1 are left out.

    Raises:
        ValueError: not as many truths as detections.
    """
    matches = match(truths, detections, IOU, SIZES)
    precision = np.full((num_classes, len(SIZES), len(IOU), len(RECALL)), np.nan)
    recall = np.full((num_classes, len(IOU)), np.nan)
    for k in range(num_classes):
        _, right, wrong, positives = matches.of_class(k)
        for a in np.flatnonzero(positives):
            precision[k, a] = precision_at_recall(right[a], wrong[a], positives[a])
        if positives[0]:
            recall[k] = right[0].sum(1) / positives[0]

    by_size = [_mean(precision[:, a]) for a in range(len(SIZES))]
    ap50, ap75 = _mean(precision[:, 0, 0]), _mean(precision[:, 0, 5])
    return CocoScores(by_size[0], ap50, ap75, *by_size[1:], _mean(recall), precision[:, 0].mean((1, 2)), precision[:, 0, 0].mean(1))


def precision_at_recall(right: np.ndarray, wrong: np.ndarray, positives: int) -> np.ndarray:
    """Interpolated precision at the 101 recalls of COCO.

    Args:
        right: (T, n) bool, in falling confidence: took a counted truth.
        wrong: (T, n) bool: took none. Neither: ignored.
        positives: counted truths, at least 1.

    Returns:
        (T, 101): the highest precision at any recall at least as high, 0 where that recall is never reached.
    """
    row, column = np.nonzero(right)
    hits = right.cumsum(1)[row, column]  # 1, 2… along each row: only here can precision rise
    misses = wrong.cumsum(1)[row, column]
    envelope = np.zeros((len(right), positives + 1))
    envelope[row, hits] = hits / (misses + hits + _EPS)
    envelope = np.maximum.accumulate(envelope[:, ::-1], 1)[:, ::-1]  # (T, hits), what remains reachable
    needed = np.searchsorted(np.arange(positives + 1) / positives, RECALL)
    return envelope[:, needed]


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
