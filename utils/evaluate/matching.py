"""COCO's assignment of detections to truths, for all images, IoU thresholds and size ranges at once.

The rule (pycocotools' COCOeval, `evaluateImg`): within one image and class, detections in falling confidence take the truth of the highest IoU
that is at least the threshold and not yet taken. A truth outside the size range, or a crowd, is *ignored*: it is taken only where no
counted truth can be, and a crowd by any number of detections; a detection that took an ignored truth is neither right nor wrong.
So is one that took nothing and lies outside the size range itself. tests/test_evaluate_coco.py holds this equal to pycocotools.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.boxes import Letterbox

ALL_SIZES = np.array([[0.0, 1e5**2]])  # px^2, COCO's range "all"
MAX_DETECTIONS = 100  # of one class on one image, COCO's largest
_BLOCK = 16_384  # detections whose IoUs are held in memory at once


class Truth(NamedTuple):
    """The labelled objects of one image, in the original image's pixels."""

    xyxy: np.ndarray  # (m, 4)
    cls: np.ndarray  # (m,) int
    area: np.ndarray | None = None  # (m,) px^2; None: the boxes' areas
    crowd: np.ndarray | None = None  # (m,) bool; None: no crowds


class Detections(NamedTuple):
    """What a detector found on one image, in the original image's pixels, in any order."""

    xyxy: np.ndarray  # (n, 4)
    conf: np.ndarray  # (n,)
    cls: np.ndarray  # (n,) int


def to_detections(boxes: np.ndarray, letterbox: Letterbox) -> Detections:
    """What suppression leaves, (n, 6) x1, y1, x2, y2, confidence, class, brought back to the original image's pixels; in float64."""
    boxes = boxes.astype(np.float64)
    return Detections(letterbox.back(boxes[:, :4]), boxes[:, 4], boxes[:, 5].astype(np.int64))


class Matches(NamedTuple):
    """Detections of all images, sorted by class and within it by falling confidence (ties: by image, then as given), and what each took.

    Detections beyond the most of a class on an image are gone. A *candidate* overlaps a truth of its class by the lowest threshold.
    """

    conf: np.ndarray  # (N,)
    cls: np.ndarray  # (N,)
    source: np.ndarray  # (N,) index into the concatenation of the given detections
    in_range: np.ndarray  # (A, N) bool: its own area lies in the size range
    candidates: np.ndarray  # (K,) rising indices into N
    taken: np.ndarray  # (A, T, K) index of the taken truth in the concatenation of the given truths, -1: none
    truth_cls: np.ndarray  # (M,) of the given truths
    counted: np.ndarray  # (A, M) bool: not ignored

    def of_class(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Confidences (n,), right (A, T, n), wrong (A, T, n) of class k's detections and the numbers of counted truths (A,)."""
        first, last = np.searchsorted(self.cls, (k, k + 1))
        low, high = np.searchsorted(self.candidates, (first, last))
        local, taken = self.candidates[low:high] - first, self.taken[:, :, low:high]
        ranges, thresholds = taken.shape[:2]
        right = np.zeros((ranges, thresholds, last - first), bool)
        wrong = np.repeat(self.in_range[:, None, first:last], thresholds, axis=1)
        if taken.size:
            counted = self.counted[np.arange(ranges)[:, None, None], taken]  # where taken is -1, masked below
            right[:, :, local] = (taken >= 0) & counted
            wrong[:, :, local] &= taken < 0
        return self.conf[first:last], right, wrong, self.counted[:, self.truth_cls == k].sum(1)


def match(
    truths: Sequence[Truth], detections: Sequence[Detections], iou: np.ndarray, area_ranges: np.ndarray = ALL_SIZES, most: int | None = MAX_DETECTIONS
) -> Matches:
    """Assign detections to truths by COCO's rule.

    Args:
        truths: one for each image; an image without objects has empty arrays.
        detections: of the same images, in the same order.
        iou: (T,) rising thresholds.
        area_ranges: (A, 2) px^2, both ends included.
        most: detections of a class on an image; None: all.

    Raises:
        ValueError: not as many truths as detections.
    """
    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} images' truths, {len(detections)} images' detections")
    truth_image, truth_boxes, truth_cls = _flatten(truths)
    crowd = _concatenate([np.zeros(len(t.cls), bool) if t.crowd is None else np.asarray(t.crowd, bool) for t in truths], bool)
    area = _concatenate([np.full(len(t.cls), np.nan) if t.area is None else t.area for t in truths], float)
    area = np.where(np.isnan(area), truth_boxes[2] * truth_boxes[3], area)
    counted = _within(area, area_ranges) & ~crowd

    image, boxes, cls = _flatten(detections)
    conf = _concatenate([d.conf for d in detections], float)
    group, truth_group = cls * len(truths) + image, truth_cls * len(truths) + truth_image
    order = np.lexsort((-conf, group))
    if most is not None:
        order = order[_rank(group[order]) < most]
    order = order[np.lexsort((-conf[order], cls[order]))]  # over images now; stable, so ties stay in the images' order

    boxes = boxes[:, order]
    edges = _edges(boxes, group[order], truth_boxes, truth_group, crowd, min(iou[0], 1 - 1e-10))
    candidates, taken = _greedy(edges, group[order], crowd, counted, np.minimum(iou, 1 - 1e-10))
    in_range = _within(boxes[2] * boxes[3], area_ranges)
    return Matches(conf[order], cls[order], order, in_range, candidates, taken, truth_cls, counted)


class _Edges(NamedTuple):
    """Detection-truth pairs that overlap enough, sorted by detection, then from the least to the most wanted truth."""

    detection: np.ndarray  # (E,)
    truth: np.ndarray  # (E,)
    iou: np.ndarray  # (E,)


def _edges(
    boxes: np.ndarray, group: np.ndarray, truth_boxes: np.ndarray, truth_group: np.ndarray, crowd: np.ndarray, lowest: float
) -> _Edges:
    by_group = np.argsort(truth_group, kind="stable")
    first = np.searchsorted(truth_group[by_group], group, "left")
    count = np.searchsorted(truth_group[by_group], group, "right") - first
    kept = []
    with_truth = np.flatnonzero(count)
    for start in range(0, len(with_truth), _BLOCK):
        block = with_truth[start : start + _BLOCK]
        n = count[block]
        detection = np.repeat(block, n)
        truth = by_group[np.repeat(first[block] - (np.cumsum(n) - n), n) + np.arange(n.sum())]
        iou = _iou(boxes[:, detection], truth_boxes[:, truth], crowd[truth])
        enough = iou >= lowest
        kept.append(_Edges(detection[enough], truth[enough], iou[enough]))
    edges = _Edges(*(np.concatenate(parts) for parts in zip(*kept, strict=True))) if kept else _Edges(*np.zeros((2, 0), int), np.zeros(0))
    order = np.lexsort((edges.truth, edges.iou, edges.detection))
    return _Edges(*(values[order] for values in edges))


def _greedy(
    edges: _Edges, group: np.ndarray, crowd: np.ndarray, counted: np.ndarray, iou: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(K,) candidates and (A, T, K) what each took.

    Images and classes don't touch each other, so round r lets the r-th candidate of every group choose at the same time.
    """
    candidates, column = np.unique(edges.detection, return_inverse=True)  # K; edge -> column
    by_group = np.argsort(group[candidates], kind="stable")
    turn = np.empty(len(candidates), int)
    turn[by_group] = _rank(group[candidates][by_group])

    order = np.argsort(turn[column], kind="stable")
    truth, overlap, column = edges.truth[order], edges.iou[order], column[order]
    bounds = np.searchsorted(turn[column], np.arange(turn.max(initial=-1) + 2))
    free = np.ones((len(counted), len(iou), len(crowd)), bool)
    taken = np.full((len(counted), len(iou), len(candidates)), -1)
    for start, stop in itertools.pairwise(bounds):
        t, n = truth[start:stop], stop - start
        possible = free[:, :, t] & (overlap[start:stop] >= iou[:, None])  # (A, T, n)
        wish = possible * (np.arange(1, n + 1) + n * counted[:, None, t])  # a counted truth before an ignored one, then the edges' order
        chooser, first_edge = np.unique(column[start:stop], return_index=True)
        best = np.maximum.reduceat(wish, first_edge, axis=2)  # (A, T, choosers), 0: nothing possible
        choice = np.where(best > 0, t[(best - 1) % n], -1)
        taken[:, :, chooser] = choice
        a, k, which = np.nonzero(best)
        free[a, k, choice[a, k, which]] = crowd[choice[a, k, which]]
    return candidates, taken


def _iou(boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Paired, (4, E) and (4, E) -> (E,); over a crowd the overlap's share of the detection. Rounds as pycocotools does, so ties agree."""
    (x, y, w, h), (truth_x, truth_y, truth_w, truth_h) = boxes, truth
    overlap_w = np.minimum(x + w, truth_x + truth_w) - np.maximum(x, truth_x)
    overlap_h = np.minimum(y + h, truth_y + truth_h) - np.maximum(y, truth_y)
    overlap = np.maximum(overlap_w, 0) * np.maximum(overlap_h, 0)
    union = np.where(crowd, w * h, w * h + truth_w * truth_h - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def _flatten(images: Sequence[Truth] | Sequence[Detections]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image indices (N,), boxes as rows left, top, width, height (4, N), classes (N,) of all images together."""
    image = np.repeat(np.arange(len(images)), [len(i.cls) for i in images])
    xyxy = _concatenate([np.reshape(i.xyxy, (-1, 4)) for i in images], float).reshape(-1, 4)
    x, y, right, bottom = xyxy.T
    return image, np.stack((x, y, right - x, bottom - y)), _concatenate([i.cls for i in images], int)


def _within(area: np.ndarray, area_ranges: np.ndarray) -> np.ndarray:
    """(N,) areas in (A, 2) ranges -> (A, N) bool."""
    return (area >= area_ranges[:, :1]) & (area <= area_ranges[:, 1:])


def _rank(sorted_values: np.ndarray) -> np.ndarray:
    """0, 1, 2… within each run of equal values."""
    return np.arange(len(sorted_values)) - np.searchsorted(sorted_values, sorted_values, "left")


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
