"""Complete IoU: how far a box is from where it should be, for the loss."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy

_EPS = 1e-7


def ciou(a_cxcywh: Tensor, b_cxcywh: Tensor) -> Tensor:
    """Complete IoU of paired boxes, (N, 4) and (N, 4) -> (N,), differentiable (Zheng et al., 2020, eq. 9-11)."""
    a, b = cxcywh_to_xyxy(a_cxcywh), cxcywh_to_xyxy(b_cxcywh)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area_a, area_b = a_cxcywh[:, 2:].prod(1), b_cxcywh[:, 2:].prod(1)
    iou = overlap / (area_a + area_b - overlap + _EPS)

    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    diagonal2 = hull.square().sum(1) + _EPS
    centres2 = (a_cxcywh[:, :2] - b_cxcywh[:, :2]).square().sum(1)
    angle_a = torch.atan(a_cxcywh[:, 2] / (a_cxcywh[:, 3] + _EPS))
    angle_b = torch.atan(b_cxcywh[:, 2] / (b_cxcywh[:, 3] + _EPS))
    aspect = 4 / math.pi**2 * (angle_a - angle_b).square()
    with torch.no_grad():
        alpha = aspect / (1 - iou + aspect + _EPS)
    return iou - centres2 / diagonal2 - alpha * aspect
