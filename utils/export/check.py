"""The proof that an exported file finds what its checkpoint finds: the same images through both, raw outputs and final boxes compared."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from utils.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.data.augment import letterbox
from utils.data.images import ImageError, read_image
from utils.data.labels import load_split
from utils.data.scenes import render
from utils.data.spec import load_data_spec
from utils.errors import UserError
from utils.log import warn
from utils.network import Network, infer
from utils.nms import NmsOptions, non_max_suppression

CONFIDENCE = 0.25  # final boxes above it are compared
_MOST_BOXES = 300  # of an image
_IMAGES = 8
_TOGETHER = 4  # images of a batch
_LITTLE_PX = 0.5
_MAY_STRAY = 0.002  # of all raw rows: the coarsest of five levels has 0.003 of them


class Tolerance(NamedTuple):
    """What a partner of a box may differ by."""

    iou: float  # at least
    conf: float  # at most


TOLERANCES = {"fp32": Tolerance(0.99, 0.01), "fp16": Tolerance(0.95, 0.03)}  # by the file's precision


@dataclass(frozen=True)
class Agreement:
    """How far an exported file is from its checkpoint on some images.

    Attributes:
        box_px: largest and mean difference of the raw boxes' centres and sides.
        score: likewise of objectness and class probabilities.
        boxes: final boxes of both, above `threshold`.
        unmatched: those without a partner in the other.
        strayed: share of all raw rows whose box or scores are outside the tolerance, however sure they are.
        what: was compared.
    """

    box_px: tuple[float, float]
    score: tuple[float, float]
    images: int
    boxes: int
    unmatched: int
    threshold: float
    what: str = "raw outputs"
    strayed: float = 0.0

    @property
    def holds(self) -> bool:
        return self.boxes > 0 and self.unmatched == 0 and self.strayed <= _MAY_STRAY

    def __str__(self) -> str:
        matched = "no boxes to compare" if not self.boxes else (
            f"{self.unmatched} of {self.boxes} boxes above {self.threshold:.2g} have no partner" if self.unmatched else
            f"all {self.boxes} boxes above {self.threshold:.2g} have their partner")
        if self.strayed > _MAY_STRAY:
            matched += f", but {self.strayed:.1%} of all rows are further apart than they may be"
        return (f"{self.what} of {self.images} inputs differ by max {self.box_px[0]:.2g}, mean {self.box_px[1]:.2g} px in boxes and "
                f"max {self.score[0]:.2g}, mean {self.score[1]:.2g} in scores; {matched}")


def check_images(data: str = "", data_root: str = "") -> list[np.ndarray]:
    """A few images (H, W, 3) uint8 BGR, evenly from the val split of a data YAML where one is named, else generated ones and a photograph's views.

    Raises:
        UserError: no such data, or none of its images can be read.
    """
    if not data:
        views = _photographs()
        return [*(render(seed).image for seed in range(_IMAGES - len(views))), *views]
    paths = load_split(load_data_spec(data, data_root or None), "val").images
    count = min(_IMAGES, len(paths))
    images = []
    for n in range(count):
        try:
            images.append(read_image(paths[n * len(paths) // count]))
        except ImageError as error:
            warn(f"{error}: left out of the check")
    if not images:
        raise UserError(f"{data}: none of {count} images of its val split can be read: mend them, or check on generated ones without --data")
    return images


def _photographs() -> list[np.ndarray]:
    """Grace Hopper, 1983, in the public domain (U.S. Navy), which Matplotlib brings: whole, mirrored, beside her mirror image, in rows of three;
    none where a system's package of Matplotlib leaves it out."""
    try:
        whole = read_image(str(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"))
    except ImageError:
        return []
    mirrored = np.ascontiguousarray(whole[:, ::-1])
    half = cv2.resize(whole, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return [whole, mirrored, np.hstack((whole, mirrored)), np.tile(half, (2, 3, 1))]


def check_batches(images: Sequence[np.ndarray], imgsz: tuple[int, int], stride: int | None) -> list[Tensor]:
    """(H, W, 3) uint8 BGR images as batches (B, 3, h, w) uint8 RGB of `imgsz`; where any size will do, also each in a shape of its own.

    Args:
        stride: that shapes are multiples of; None: `imgsz` alone.
    """
    whole = torch.cat([_to_tensor(image, imgsz, None) for image in images])
    return [*whole.split(_TOGETHER), *([_to_tensor(image, imgsz, stride) for image in images] if stride else [])]


def _to_tensor(image: np.ndarray, imgsz: tuple[int, int], stride: int | None) -> Tensor:
    padded, _ = letterbox(image, imgsz, stride)
    return torch.from_numpy(cv2.cvtColor(padded, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)[None]


def compare(reference: Network, exported: Network, batches: Iterable[Tensor], tolerance: Tolerance, device: torch.device) -> Agreement:
    """The same batches (B, 3, H, W) uint8 through both.

    Every final box of one needs a partner among all boxes of the other, before suppression: which of near twins survives may hang on the last
    digit. Where the reference is sure of nothing, its best boxes are compared, with a tolerance of confidence as much smaller. And nearly every row
    must be near its own counterpart, so that no part of the output is wrong unseen.

    Args:
        device: of the reference; the exported one takes images from the CPU.

    Raises:
        UserError: they give another number of boxes.
    """
    pairs = [_both(reference, exported, batch, device) for batch in batches]
    strayed = torch.cat([_stray(a, b, tolerance) for a, b in pairs]).double().mean()
    best = max(float(a[..., 4:5].mul(a[..., 5:]).nan_to_num(0).max()) for a, _ in pairs)
    threshold = min(CONFIDENCE, best / 2)
    tolerance = tolerance._replace(conf=tolerance.conf * threshold / CONFIDENCE)
    options = NmsOptions(threshold, max_det=_MOST_BOXES)
    boxes = unmatched = 0
    for pair in pairs:
        for ours, others in (pair, pair[::-1]):
            for own, image in zip(ours.numpy(), others, strict=True):
                final = torch.from_numpy(non_max_suppression(own, options))
                boxes += len(final)
                unmatched += without_partner(final, image, tolerance)
    return Agreement(_distance(pairs, slice(0, 4)), _distance(pairs, slice(4, None)), sum(len(a) for a, _ in pairs), boxes, unmatched, threshold,
                     strayed=float(strayed))


def _both(reference: Network, exported: Network, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    ours, others = infer(reference, batch, device, torch.float32)[1].cpu(), infer(exported, batch, torch.device("cpu"), torch.float32)[1]
    if ours.shape != others.shape:
        height, width = batch.shape[2:]
        raise UserError(f"gives {others.shape[1]} boxes for an image of {height}x{width} px, where the checkpoint gives {ours.shape[1]}")
    return ours, others


def without_partner(final: Tensor, decoded: Tensor, tolerance: Tolerance) -> int:
    """Final boxes (n, 6) for which no decoded one (N, 5 + C) of their class is near enough in place and confidence."""
    near = box_iou(visible(xyxy_to_cxcywh(final[:, :4])), visible(decoded[:, :4])) >= tolerance.iou  # (n, N)
    scores = (decoded[:, 5:] * decoded[:, 4:5])[:, final[:, 5].long()].T
    alike = (scores - final[:, 4:5]).abs() <= tolerance.conf
    return int((~(near & alike).any(1)).sum())


def _stray(ours: Tensor, others: Tensor, tolerance: Tolerance) -> Tensor:
    """(B * N,) which rows (B, N, 5 + C) are too far from their counterparts."""
    a, b = (visible(rows[..., :4].flatten(0, 1)) for rows in (ours, others))
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    iou = shared / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared)
    differ = (ours - others).abs().flatten(0, 1)
    in_place = (iou >= tolerance.iou) | (differ[:, :4] <= _LITTLE_PX).all(1)  # of small boxes a digit is a large share
    return ~(in_place & (differ[:, 4:] <= tolerance.conf).all(1))


def visible(cxcywh: Tensor) -> Tensor:
    """Corners of boxes at least a pixel wide and high: of smaller ones rounding leaves no area to compare."""
    return cxcywh_to_xyxy(torch.cat((cxcywh[:, :2], cxcywh[:, 2:].clamp(min=1)), 1))


def _distance(pairs: Sequence[tuple[Tensor, Tensor]], columns: slice) -> tuple[float, float]:
    """Largest and mean absolute difference."""
    differences = torch.cat([(a[..., columns] - b[..., columns]).abs().flatten() for a, b in pairs])
    return float(differences.max()), float(differences.mean())
