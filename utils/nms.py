"""Non-maximum suppression: decoded predictions of a batch -> the boxes to keep, image by image."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from utils.boxes import cxcywh_to_xyxy

_MAX_CANDIDATES = 30_000  # of one image, best first: bounds the work on an untrained network's noise
_STEP = 4  # candidates decided at a time for each box that may be kept
_CLASS_SHIFT_PX = 2.0**24  # farther than any box reaches, so that boxes of two classes never overlap; exact in float64


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


VALIDATION = NmsOptions(conf_thres=0.001, iou_thres=0.6, multi_label=True, max_det=300)


def non_max_suppression(predictions: Tensor, options: NmsOptions) -> list[Tensor]:
    """(B, N, 5 + C) of cx, cy, w, h, objectness, class probabilities -> B tensors (n, 6): x1, y1, x2, y2, confidence, class; best first.

    An image without a box gives a (0, 6) tensor. Of equal confidences the earlier prediction comes first; a box that is not
    finite, or whose confidence is no number, is left out.
    """
    # Before any product or sort: all but a few rows go here, as no confidence exceeds the objectness.
    likely = predictions[..., 4] > options.conf_thres
    kept = []
    for image, mask in zip(predictions, likely, strict=True):
        rows = image.index_select(0, mask.nonzero().squeeze(1))
        conf, cls, row = _candidates(rows, options)
        kept.append(_suppress(cxcywh_to_xyxy(rows[:, :4])[row], conf, cls, options))
    return kept


def _candidates(rows: Tensor, options: NmsOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, 5 + C) whose objectness passes -> confidence, class and row (m,) of each candidate, best first."""
    unreal = 0 * rows[:, :4].sum(1, keepdim=True)  # not a number where the box is not finite: then no score is above a threshold
    scores = rows[:, 5:] * (rows[:, 4:5] + unreal)
    if options.multi_label and scores.shape[1] > 1:
        index = (scores > options.conf_thres).flatten().nonzero().squeeze(1)
        conf, row, cls = scores.flatten()[index], index // scores.shape[1], index % scores.shape[1]
    else:
        conf, cls = scores.max(1)
        row = (conf > options.conf_thres).nonzero().squeeze(1)
        conf, cls = conf[row], cls[row]
    if options.classes is not None:
        chosen = torch.isin(cls, torch.as_tensor(options.classes, device=cls.device, dtype=cls.dtype))
        conf, cls, row = conf[chosen], cls[chosen], row[chosen]
    if len(conf) > _MAX_CANDIDATES:
        conf, best = conf.topk(_MAX_CANDIDATES)
        cls, row = cls[best], row[best]
    conf, order = conf.sort(descending=True, stable=True)
    return conf, cls[order], row[order]


def _suppress(xyxy: Tensor, conf: Tensor, cls: Tensor, options: NmsOptions) -> Tensor:
    """The boxes that remain of candidates sorted best first.

    They are decided from the best down, some at a time beside those kept so far, so that the many after the last box wanted cost nothing.
    """
    boxes, scores = xyxy.double(), conf.double()
    if not options.agnostic:
        boxes += cls[:, None] * _CLASS_SHIFT_PX
    step = max(_STEP * options.max_det, 1024)
    keep = cls[:0]
    for start in range(0, len(conf), step):
        pool = torch.cat((keep, torch.arange(start, min(start + step, len(conf)), device=keep.device)))
        keep = pool[torchvision_nms(boxes.index_select(0, pool), scores.index_select(0, pool), options.iou_thres)]
        if len(keep) >= options.max_det:
            break
    keep = keep[: options.max_det]
    return torch.cat((xyxy[keep], conf[keep, None], cls[keep, None].to(conf.dtype)), 1)
