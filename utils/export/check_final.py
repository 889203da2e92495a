"""The proof of files that suppress boxes themselves: what they keep is what suppression, by its definition, leaves of the checkpoint's boxes."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchvision.ops import box_iou

from utils.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.export.check import Agreement, Tolerance, visible, without_partner
from utils.export.metadata import GraphNms
from utils.network import Network, infer
from utils.nms import NmsOptions, non_max_suppression


def compare_final(
    reference: Network, exported: Network, nms: GraphNms, batches: Iterable[Tensor], tolerance: Tolerance, device: torch.device
) -> Agreement:
    """`compare` for a file that suppresses boxes itself, whose boxes must be what suppression, by its definition, leaves of the reference's.

    Each of the file's needs a partner among all that the reference has before suppression, must not overlap a better one of its class, and must be
    above the threshold; each that suppression leaves of the reference's needs a partner in the file, or a box there that suppresses it. The
    tolerance is spent on all of that, because which of near twins survives may hang on the last digit.
    """
    distances, boxes, unmatched, images = [], 0, 0, 0
    options = NmsOptions(nms.conf_thres, nms.iou_thres, max_det=nms.max_det)
    for batch in batches:
        everything = infer(reference, batch, device, torch.float32)[1].cpu()
        found = infer(exported, batch, torch.device("cpu"), torch.float32)[1]
        for ours, theirs in zip(everything, found, strict=True):
            own, final = torch.from_numpy(non_max_suppression(ours.numpy(), options)), _as_final(theirs)
            unmatched += int(_untrue(final, ours, nms, tolerance).sum() + _lost(own, final, nms, tolerance).sum())
            sure = own[:, 4] > nms.conf_thres + tolerance.conf  # the file may leave out the others
            boxes, images = boxes + int(sure.sum()) + len(final), images + 1
            distances.append(_partner_distance(final, ours))
    box_px, score = (torch.cat([d[:, columns].flatten() for d in distances]) for columns in (slice(0, 4), slice(4, 5)))
    largest_and_mean = [(float(d.max()), float(d.mean())) if len(d) else (0.0, 0.0) for d in (box_px, score)]
    return Agreement(*largest_and_mean, images, boxes, unmatched, nms.conf_thres, "final boxes")


def surest(reference: Network, batches: Iterable[Tensor], device: torch.device) -> float:
    """The highest confidence that the reference has in any box."""
    decoded = (infer(reference, batch, device, torch.float32)[1] for batch in batches)
    return max(float(boxes[..., 4:5].mul(boxes[..., 5:]).nan_to_num(0).max()) for boxes in decoded)


def _as_final(spread: Tensor) -> Tensor:
    """Rows (N, 5 + C) of an exported file with suppression inside -> its boxes (n, 6): x1, y1, x2, y2, confidence, class."""
    rows = spread[spread[:, 4] != 0]
    return torch.cat((cxcywh_to_xyxy(rows[:, :4]), rows[:, 4:5], rows[:, 5:].argmax(1, keepdim=True)), 1)


def _untrue(final: Tensor, decoded: Tensor, nms: GraphNms, tolerance: Tolerance) -> Tensor:
    """Which of a file's boxes (n, 6) no box of the reference's (N, 5 + C) is like, or that suppression should not have let pass."""
    lone = torch.tensor([without_partner(box[None], decoded, tolerance) for box in final], dtype=torch.bool)
    doubled = (_same_class_iou(final, final) > nms.iou_thres + _slack(tolerance)).tril(-1).any(1)
    return lone | doubled | (final[:, 4] < nms.conf_thres - tolerance.conf)


def _lost(own: Tensor, final: Tensor, nms: GraphNms, tolerance: Tolerance) -> Tensor:
    """Which boxes that suppression leaves of the reference's (n, 6) the file has neither found, suppressed nor had no room for."""
    overlap, gap = _same_class_iou(own, final), final[None, :, 4] - own[:, None, 4]
    alike = _same_class_iou(_visible_final(own), _visible_final(final)) >= tolerance.iou
    found = alike & (gap.abs() <= tolerance.conf)
    suppressed = (overlap > nms.iou_thres - _slack(tolerance)) & (gap >= -tolerance.conf)
    least = float(final[-1, 4]) if len(final) >= nms.max_det else nms.conf_thres
    return ~(found | suppressed).any(1) & (own[:, 4] > least + tolerance.conf)


def _slack(tolerance: Tolerance) -> float:
    """What the overlap of two boxes may differ by where both may differ."""
    return 2 * (1 - tolerance.iou)


def _same_class_iou(a: Tensor, b: Tensor) -> Tensor:
    return box_iou(a[:, :4], b[:, :4]) * (a[:, None, 5] == b[None, :, 5])


def _visible_final(boxes: Tensor) -> Tensor:
    return torch.cat((visible(xyxy_to_cxcywh(boxes[:, :4])), boxes[:, 4:]), 1)


def _partner_distance(final: Tensor, decoded: Tensor) -> Tensor:
    """(n, 5) absolute differences of a file's boxes (n, 6), in centre, sides and confidence, from the nearest of the reference's of their class."""
    rows = [final.new_zeros(0, 5)]
    for box in final:
        own = torch.cat((xyxy_to_cxcywh(box[:4]), box[4:5]))
        others = torch.cat((decoded[:, :4], decoded[:, 4:5] * decoded[:, 5 + int(box[5]), None]), 1)  # (N, 5)
        away = (own - others).abs()
        rows.append(away[away.sum(1).argmin()][None])
    return torch.cat(rows)
