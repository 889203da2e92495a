"""Anchors checked against a data set and, where they fit badly, fitted to it: k-means, then evolution."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.random import Generator

from utils.data.labels import Split

_ENOUGH_RECALL = 0.98
_MIN_SIDE_PX = 2.0


def best_possible_recall(wh: np.ndarray, anchors: np.ndarray, anchor_t: float) -> float:
    """The share of boxes (N, 2) that some anchor (K, 2) fits within the ratio `anchor_t`; 1.0 without boxes."""
    return float((_closeness(wh, anchors).max(1) > 1 / anchor_t).mean()) if len(wh) else 1.0


def _closeness(wh: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(N, K): the worse side's ratio, smaller over larger; 1 is a perfect fit."""
    ratio = wh[:, None] / anchors[None]
    return np.minimum(ratio, 1 / ratio).min(2)


def _fitness(wh: np.ndarray, anchors: np.ndarray, anchor_t: float) -> float:
    """Mean closeness of the best anchor, boxes that none fits counting 0."""
    best = _closeness(wh, anchors).max(1)
    return float((best * (best > 1 / anchor_t)).mean())


def boxes_in_pixels(boxes: list[np.ndarray], sizes: np.ndarray, imgsz: int) -> np.ndarray:
    """(N, 2) width and height of all boxes (each (n, 5) class, cx, cy, w, h) in images scaled to `imgsz`, the tiniest left out."""
    scaled = sizes * (imgsz / sizes.max(1, keepdims=True))
    wh = np.concatenate([own[:, 3:5] * size for own, size in zip(boxes, scaled, strict=True)]) if len(boxes) else np.zeros((0, 2))
    return wh[(wh >= _MIN_SIDE_PX).all(1)].astype(np.float64)


def fit_anchors(wh: np.ndarray, count: int, anchor_t: float, rng: Generator, generations: int = 1000) -> np.ndarray:
    """`count` anchors (w, h), smallest first, for boxes (N, 2), N >= count.

    k-means on sides scaled to unit deviation (as YOLOv2, section 2, but Euclidean), then `generations` of random mutation, the fitter kept.
    """
    wh = wh * rng.uniform(0.9, 1.1, (len(wh), 1)) if len(wh) < count * 2 else wh  # a handful of equal boxes would give equal centres
    anchors = _k_means(wh / wh.std(0).clip(1e-6), count, rng) * wh.std(0).clip(1e-6)
    fitness = _fitness(wh, anchors, anchor_t)
    for _ in range(generations):
        mutation = np.where(rng.random(anchors.shape) < 0.9, rng.normal(1.0, 0.1 * rng.random(), anchors.shape), 1.0).clip(0.3, 3.0)
        candidate = (anchors * mutation).clip(_MIN_SIDE_PX)
        candidate_fitness = _fitness(wh, candidate, anchor_t)
        if candidate_fitness > fitness:
            anchors, fitness = candidate, candidate_fitness
    return anchors[np.argsort(anchors.prod(1))]


def _k_means(points: np.ndarray, count: int, rng: Generator, rounds: int = 30) -> np.ndarray:
    """Lloyd's algorithm from k-means++ seeds; (count, D) centres."""
    centres = points[[rng.integers(len(points))]]
    for _ in range(count - 1):
        distance = ((points[:, None] - centres[None]) ** 2).sum(2).min(1)
        chance = distance / distance.sum() if distance.sum() > 0 else None
        centres = np.concatenate((centres, points[[rng.choice(len(points), p=chance)]]))
    for _ in range(rounds):
        nearest = ((points[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        centres = np.stack([points[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(count)])
    return centres


def check_anchors(wh: np.ndarray, anchors: np.ndarray, anchor_t: float, must_fit: bool, rng: Generator) -> tuple[np.ndarray, str]:
    """Anchors (L, A, 2) in pixels to train with, and one line on why.

    Kept when they reach a best possible recall of 0.98, unless `must_fit`; refitted ones are taken only where they are better.
    """
    flat = anchors.reshape(-1, 2)
    recall = best_possible_recall(wh, flat, anchor_t)
    if (recall >= _ENOUGH_RECALL and not must_fit) or len(wh) < len(flat):
        return anchors, f"anchors fit {recall:.1%} of the boxes: kept"
    sample = wh if len(wh) <= 20_000 else wh[rng.permutation(len(wh))[:20_000]]
    fitted = fit_anchors(sample, len(flat), anchor_t, rng)
    new_recall = best_possible_recall(wh, fitted, anchor_t)
    if new_recall <= recall and not must_fit:
        return anchors, f"anchors fit {recall:.1%} of the boxes and refitted ones no more: kept"
    return fitted.reshape(anchors.shape), f"anchors refitted to the data: {recall:.1%} -> {new_recall:.1%} of the boxes"


def adapt_anchors(model: Any, split: Split, imgsz: int, anchor_t: float, keep: bool, seed: int) -> str:
    """Check a DetectionModel's anchors against a split and refit them where they fit badly; one line on what was done.

    Args:
        keep: leave them whatever their recall (--noautoanchor), unless the YAML gives only their number.
    """
    if keep and model.head.anchors_given:
        return "anchors kept as the YAML has them"
    wh = boxes_in_pixels(split.boxes, split.sizes, imgsz)
    old = model.anchors_px.cpu().double().numpy()
    new, why = check_anchors(wh, old, anchor_t, not model.head.anchors_given, np.random.default_rng(seed))
    if new is not old:
        model.set_anchors(torch.from_numpy(new))
    return why
