"""Non-maximum suppression: decoded predictions of a batch -> the boxes to keep, image by image."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from utils.boxes import cxcywh_to_xyxy

_MAX_CANDIDATES = 30_000  # of one image, best first: bounds the work on an untrained network's noise
_CLASS_SHIFT_PX = 7680.0  # farther than any box reaches, so that boxes of two classes never overlap


def non_max_suppression(
    predictions: Tensor,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    *,
    multi_label: bool = False,
    agnostic: bool = False,
    classes: Sequence[int] | None = None,
    max_det: int = 1000,
) -> list[Tensor]:
    """(B, N, 5 + C) of cx, cy, w, h, objectness, class probabilities -> B tensors (n, 6): x1, y1, x2, y2, confidence, class; best first.

    Args:
        multi_label: count a box once for each class above the threshold (validation) instead of for its best class (detection).
        agnostic: boxes suppress each other across classes.
        classes: keep these classes only.

    An image without a box gives a (0, 6) tensor.
    """
    candidates = predictions[..., 4] > conf_thres  # before any product or sort: all but a few rows go here
    return [
        _suppress(_candidates(image[mask], conf_thres, multi_label and image.shape[1] > 6, classes), iou_thres, agnostic, max_det)
        for image, mask in zip(predictions, candidates, strict=True)
    ]


def _candidates(rows: Tensor, conf_thres: float, multi_label: bool, classes: Sequence[int] | None) -> Tensor:
    """Rows (n, 5 + C) whose objectness passes -> (m, 6) corners, confidence, class."""
    scores = rows[:, 5:] * rows[:, 4:5]
    if multi_label:
        row, cls = (scores > conf_thres).nonzero(as_tuple=True)
        conf = scores[row, cls]
    else:
        conf, cls = scores.max(1)
        row = (conf > conf_thres).nonzero(as_tuple=True)[0]
        conf, cls = conf[row], cls[row]
    if classes is not None:
        keep = torch.isin(cls, torch.as_tensor(classes, device=cls.device, dtype=cls.dtype))
        row, conf, cls = row[keep], conf[keep], cls[keep]
    if len(conf) > _MAX_CANDIDATES:
        conf, best = conf.topk(_MAX_CANDIDATES)
        row, cls = row[best], cls[best]
    return torch.cat((cxcywh_to_xyxy(rows[row, :4]), conf[:, None], cls[:, None].to(conf.dtype)), 1)


def _suppress(boxes: Tensor, iou_thres: float, agnostic: bool, max_det: int) -> Tensor:
    shift = 0.0 if agnostic else boxes[:, 5:6] * _CLASS_SHIFT_PX
    return boxes[torchvision_nms(boxes[:, :4] + shift, boxes[:, 4], iou_thres)[:max_det]]
