"""The YOLOv5 loss: 1 - CIoU for boxes, binary cross-entropy for objectness (its target the IoU reached) and classes."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.hyp import Hyp
from utils.training.assign import Matches, assign
from utils.training.ciou import ciou

_LEVEL_WEIGHTS = {3: (4.0, 1.0, 0.4)}  # finest first
_MORE_LEVELS = (4.0, 1.0, 0.25, 0.06, 0.02)  # any further ones like the last


class Loss(NamedTuple):
    """`total` to minimise (summed over the batch's images) and its parts, means of the batch."""

    total: Tensor
    parts: Tensor  # one for each of the criterion's names; detached


class DetectionLoss:
    """Raw maps and targets to a loss.

    Args:
        anchors: (L, A, 2) in cells of each level.
        nc: classes.
        imgsz: training size, pixels; the gains are tuned for 640.
        strides: of the levels, in any order; none: finest first.
    """

    names = ("box", "obj", "cls")

    def __init__(self, anchors: Tensor, nc: int, hyp: Hyp, imgsz: int, label_smoothing: float = 0.0,
                 strides: Sequence[int] = ()) -> None:
        self.anchors, self.anchor_t = anchors, hyp.anchor_t
        levels = len(anchors)
        weights = _LEVEL_WEIGHTS.get(levels, _MORE_LEVELS)
        coarseness = strides or range(levels)
        ranks = [sum(other < one for other in coarseness) for one in coarseness]
        self.level_weights = [weights[min(rank, len(weights) - 1)] for rank in ranks]
        self.gains = anchors.new_tensor((hyp.box, hyp.obj * (imgsz / 640) ** 2, hyp.cls * nc / 80)) * 3 / levels
        self.obj_weight, self.cls_weight = anchors.new_tensor(hyp.obj_pw), anchors.new_tensor(hyp.cls_pw)
        self.positive, self.negative = 1 - label_smoothing / 2, label_smoothing / 2

    def __call__(self, maps: Sequence[Tensor], targets: Tensor) -> Loss:
        """
        Args:
            maps: L x (B, A, H, W, 5 + nc) raw.
            targets: (T, 6) image, class, cx, cy, w, h, normalised; T may be 0.
        """
        box = obj = cls = self.anchors.new_zeros(())
        grids = [tuple(raw.shape[2:4]) for raw in maps]
        for raw, matches, weight in zip(maps, assign(targets, self.anchors, grids, self.anchor_t), self.level_weights, strict=True):
            iou_target = torch.zeros(raw.shape[:4], device=raw.device)
            if len(matches.cls):
                predicted = raw[matches.image, matches.anchor, matches.row, matches.column].float()  # (M, 5 + nc)
                iou = ciou(box_of(predicted, matches.anchor_wh), matches.cxcywh)
                box = box + (1 - iou).mean()
                self._raise_to(iou_target, matches, iou.detach())
                cls = cls + self._class_loss(predicted[:, 5:], matches.cls)
            obj = obj + weight * F.binary_cross_entropy_with_logits(raw[..., 4].float(), iou_target, pos_weight=self.obj_weight)
        parts = torch.stack((box, obj, cls)) * self.gains
        return Loss(parts.sum() * len(maps[0]), parts.detach())

    def _class_loss(self, logits: Tensor, cls: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            return logits.new_zeros(())  # of a single class, objectness says it all
        wanted = torch.full_like(logits, self.negative)
        wanted[torch.arange(len(cls), device=cls.device), cls] = self.positive
        return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=self.cls_weight)

    @staticmethod
    def _raise_to(iou_target: Tensor, matches: Matches, iou: Tensor) -> None:
        """Objectness target: the IoU, the best where several targets meet in one place (so the result depends on no order)."""
        _, num_anchors, height, width = iou_target.shape
        place = ((matches.image * num_anchors + matches.anchor) * height + matches.row) * width + matches.column
        iou_target.view(-1).scatter_reduce_(0, place, iou.clamp(min=0), "amax")


def box_of(predicted: Tensor, anchor_wh: Tensor) -> Tensor:
    """Raw outputs (M, 5 + nc) at matched places -> (M, 4) cx, cy from the cell's corner, w, h, in cells."""
    p = predicted[:, :4].sigmoid()
    return torch.cat((p[:, :2] * 2 - 0.5, (p[:, 2:] * 2).square() * anchor_wh), 1)
