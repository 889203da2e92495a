"""What was taken for what: the confusion matrix of a detector."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.evaluate.matching import Detections, Truth, match


def confusion_matrix(
    truths: Sequence[Truth], detections: Sequence[Detections], num_classes: int, conf: float = 0.25, iou: float = 0.45
) -> np.ndarray:
    """Count pairs of predicted and true class.

    The greedy rule of `matching`, blind to classes: in falling confidence each detection takes the free truth of the highest IoU.
    Crowds are no objects here, and what only matches one is left out.

    Returns:
        (C + 1, C + 1) int: rows predicted, columns true; the last row counts missed truths, the last column false alarms.
    """
    sure = [Detections(d.xyxy[keep], d.conf[keep], d.cls[keep]) for d in detections for keep in [np.asarray(d.conf) >= conf]]
    matches = match(
        [t._replace(cls=np.zeros(len(t.cls), int)) for t in truths], [d._replace(cls=np.zeros(len(d.cls), int)) for d in sure], np.array([iou]),
        most=None)
    true = np.concatenate([t.cls for t in truths] or [[]]).astype(int)
    predicted = np.concatenate([d.cls for d in sure] or [[]]).astype(int)[matches.source]
    (counted,) = matches.counted
    taken = np.full(len(predicted), -1)
    taken[matches.candidates] = matches.taken[0, 0]

    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    hit = np.flatnonzero(taken >= 0)
    hit = hit[counted[taken[hit]]]
    missed = counted.copy()
    missed[taken[hit]] = False
    np.add.at(matrix, (predicted[hit], true[taken[hit]]), 1)
    np.add.at(matrix, (num_classes, true[missed]), 1)
    np.add.at(matrix, (predicted[taken < 0], num_classes), 1)
    return matrix
