"""Validation: every image of a split through a network, its boxes brought back to the original pixels and scored."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.boxes import cxcywh_to_xyxy
from utils.data.dataset import Batch
from utils.data.labels import Split
from utils.device import autocast
from utils.evaluate.coco import CocoScores, coco_scores
from utils.evaluate.curves import Curves, curves
from utils.evaluate.matching import Detections, Truth
from utils.errors import UserError
from utils.log import is_main_process, warn
from utils.nms import non_max_suppression


class Network(Protocol):
    """What validation needs of a model: raw outputs, and their decoding to (B, N, 5 + C) boxes."""

    def __call__(self, images: Tensor) -> list[Tensor]: ...

    def decode(self, outputs: list[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class NmsOptions:
    conf_thres: float = 0.001
    iou_thres: float = 0.6
    max_det: int = 300


class Speed(NamedTuple):
    """Milliseconds an image."""

    load: float  # waiting for the loader
    inference: float
    nms: float


@dataclass(frozen=True)
class ValResult:
    indices: tuple[int, ...]  # of the split, in the order of the next two
    truths: list[Truth]
    detections: list[Detections]
    scores: CocoScores
    curves: Curves
    loss: np.ndarray | None  # (3,) box, objectness, class
    speed: Speed

    @property
    def fitness(self) -> float:
        """0.1 mAP50 + 0.9 mAP50-95; 0 without truth."""
        return float(np.nan_to_num(0.1 * self.scores.ap50 + 0.9 * self.scores.ap))

    def metrics(self) -> dict[str, float]:
        """The means over classes, at the confidence of the best F1 for the first three."""
        seen = self.curves.classes
        mean = (lambda per_class: float(per_class[seen].mean())) if len(seen) else (lambda per_class: 0.0)
        c, s = self.curves, self.scores
        return {"precision": mean(c.precision_at_best), "recall": mean(c.recall_at_best), "f1": mean(c.f1_at_best),
                "mAP50": float(np.nan_to_num(s.ap50)), "mAP50-95": float(np.nan_to_num(s.ap))}


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images of a batch to float 0..1 on the device, channels last."""
    return images.to(device, non_blocking=True).float().div_(255)


@torch.inference_mode()
def validate(
    network: Network,
    loader: Iterable[Batch],
    split: Split,
    device: torch.device,
    dtype: torch.dtype,
    nms: NmsOptions = NmsOptions(),
    criterion: Callable | None = None,
    single_cls: bool = False,
) -> ValResult:
    """Score a network, in eval mode, on a split.

    Args:
        loader: of a RectDataset over `split`.
        criterion: `criterion(outputs, targets).parts` is averaged if given.
        single_cls: every box counts as class 0, whatever the network calls it.
    """
    indices: list[int] = []
    detections: list[Detections] = []
    losses = []
    load = inference = suppression = 0.0
    end = time.perf_counter()
    for batch in _progress(loader):
        start = time.perf_counter()
        load += start - end
        images = to_input(batch.images, device)
        with autocast(device, dtype):
            outputs = network(images)
        decoded = network.decode(outputs)
        _wait(device)
        inferred = time.perf_counter()
        inference += inferred - start
        for boxes, letterbox in zip(non_max_suppression(decoded, **vars(nms), multi_label=not single_cls, agnostic=single_cls), batch.letterboxes, strict=True):
            boxes = boxes.double().cpu().numpy()
            cls = np.zeros(len(boxes), np.int64) if single_cls else boxes[:, 5].astype(np.int64)
            detections.append(Detections(letterbox.back(boxes[:, :4]), boxes[:, 4], cls))
        suppression += time.perf_counter() - inferred
        indices.extend(batch.indices)
        if criterion is not None:
            losses.append(criterion(outputs, batch.targets.to(device)).parts.cpu().numpy())
        end = time.perf_counter()
    truths = [truth_of(split, i) for i in indices]
    per_image = 1e3 / max(len(indices), 1)
    return ValResult(
        indices=tuple(indices),
        truths=truths,
        detections=detections,
        scores=coco_scores(truths, detections, len(split.names)),
        curves=curves(truths, detections, len(split.names)),
        loss=np.mean(losses, 0) if losses else None,
        speed=Speed(load * per_image, inference * per_image, suppression * per_image),
    )


def check_classes(names: Sequence[str], wanted: Sequence[str], single_cls: bool, weights: str) -> None:
    """Refuse a network whose classes are not the data's: its mAP would mean nothing.

    Raises:
        UserError: another number of classes, or other names in their places.
    """
    if single_cls or tuple(names) == tuple(wanted):
        return
    if len(names) != len(wanted):
        raise UserError(f"{weights}: knows {len(names)} classes, the data has {len(wanted)}: use the data YAML that it was trained on, or --single-cls")
    differing = next((n, a, b) for n, (a, b) in enumerate(zip(names, wanted, strict=True)) if a != b)
    warn(f"{weights}: class {differing[0]} is named {differing[1]} there and {differing[2]} in the data: scored by number")


def truth_of(split: Split, index: int) -> Truth:
    """An image's labels in its own pixels; crowds (COCO's) come last."""
    boxes, crowds = split.boxes[index].astype(np.float64), split.crowds[index].astype(np.float64)
    rows = np.concatenate((boxes, crowds))
    xyxy = cxcywh_to_xyxy(rows[:, 1:]) * np.tile(split.sizes[index], 2)
    area = None if split.areas is None else np.concatenate((split.areas[index], split.crowd_areas[index]))
    return Truth(xyxy, rows[:, 0].astype(np.int64), area, np.arange(len(rows)) >= len(boxes))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # else the clock would stop before the work does


def _progress(loader: Iterable[Batch]) -> Iterator[Batch]:
    return iter(tqdm(loader, desc="val", leave=False, dynamic_ncols=True, disable=not is_main_process()))
