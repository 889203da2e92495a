"""Validation: every image of a split through a network, its boxes brought back to the original pixels and scored."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from utils.boxes import cxcywh_to_xyxy
from utils.data.dataset import Batch
from utils.data.labels import Split
from utils.errors import UserError
from utils.evaluate.coco import CocoScores, coco_scores
from utils.evaluate.curves import Curves, curves
from utils.evaluate.matching import Detections, Truth, to_detections
from utils.log import is_main_process, warn
from utils.network import Network, infer, inference_threads, to_arrays
from utils.nms import VALIDATION, NmsOptions, non_max_suppression

_AT_ONCE = 2  # images that a CPU thread takes together


class Speed(NamedTuple):
    """Milliseconds an image."""

    load: float  # waiting for the loader
    inference: float
    nms: float


@dataclass(frozen=True)
class ValResult:
    indices: tuple[int, ...]  # of the split, by rising image id, as the next two
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
        c, s = self.curves, self.scores
        return {"precision": float(c.mean(c.precision_at_best)), "recall": float(c.mean(c.recall_at_best)), "f1": float(c.mean(c.f1_at_best)),
                "mAP50": float(np.nan_to_num(s.ap50)), "mAP50-95": float(np.nan_to_num(s.ap))}


def validate(
    network: Network,
    loader: Iterable[Batch],
    split: Split,
    device: torch.device,
    dtype: torch.dtype,
    nms: NmsOptions = VALIDATION,
    criterion: Callable | None = None,
    single_cls: bool = False,
) -> ValResult:
    """Score a network, in eval mode, on a split.

    Args:
        loader: of a RectDataset over `split`.
        criterion: `criterion(outputs, targets).parts` is averaged over images if given.
        single_cls: every box counts as class 0, whatever the network calls it.
    """
    nms = nms.with_one_class() if single_cls else nms
    indices: list[int] = []
    shares: list[_Share] = []
    load = inference = suppression = 0.0
    end = time.perf_counter()
    at_once = getattr(network, "batch", None) or _AT_ONCE  # an exported file of a fixed batch fills it up, with images of nothing
    with inference_threads(device) as (pool, workers):
        for batch in tqdm(loader, desc="val", leave=False, dynamic_ncols=True, disable=not is_main_process()):
            begin = time.perf_counter()
            load += begin - end
            # A loss is a mean over a share's boxes, so that shares must not be small; without one, small shares keep a CPU's caches warm.
            parts = workers if criterion or workers == 1 else -(-len(batch.indices) // at_once)
            done = list(pool.map(lambda part: _score_share(network, part, device, dtype, nms, criterion), _split_batch(batch, parts)))
            shares += done
            indices.extend(batch.indices)
            end = time.perf_counter()
            # Threads run side by side, and where there are fewer shares than threads some do nothing: the clock on the wall is what counts.
            wall_of_each = (end - begin) / max(sum(share.seconds for share in done), 1e-9)
            inference += wall_of_each * sum(share.inference_s for share in done)
            suppression += wall_of_each * sum(share.nms_s for share in done)
    detections = [found for share in shares for found in share.detections]
    # Of equal confidences that of the image with the smaller id comes first, as in pycocotools, not the one that was padded with others.
    order = sorted(range(len(indices)), key=lambda n: split.image_ids[indices[n]])
    indices, detections = [indices[n] for n in order], [detections[n] for n in order]
    if single_cls:
        detections = [found._replace(cls=np.zeros_like(found.cls)) for found in detections]
    truths = [truth_of(split, i) for i in indices]
    per_image = 1e3 / max(len(indices), 1)
    losses = [(share.loss, len(share.detections)) for share in shares if share.loss is not None]
    return ValResult(
        indices=tuple(indices),
        truths=truths,
        detections=detections,
        scores=coco_scores(truths, detections, len(split.names)),
        curves=curves(truths, detections, len(split.names)),
        loss=np.average([loss for loss, _ in losses], 0, [images for _, images in losses]) if losses else None,
        speed=Speed(load * per_image, inference * per_image, suppression * per_image),
    )


class _Share(NamedTuple):
    """What one thread found in its share of a batch."""

    detections: list[Detections]
    loss: np.ndarray | None
    inference_s: float
    nms_s: float
    seconds: float  # with its loss


def _score_share(
    network: Network, batch: Batch, device: torch.device, dtype: torch.dtype, nms: NmsOptions, criterion: Callable | None
) -> _Share:
    start = time.perf_counter()
    outputs, decoded = infer(network, batch.images, device, dtype)
    inferred = time.perf_counter()
    arrays = to_arrays(decoded, nms.conf_thres)
    detections = [to_detections(non_max_suppression(boxes, nms), letterbox) for boxes, letterbox in zip(arrays, batch.letterboxes, strict=True)]
    done = time.perf_counter()
    with torch.inference_mode():
        loss = criterion(outputs, batch.targets.to(device)).parts.cpu().numpy() if criterion else None
    return _Share(detections, loss, inferred - start, done - inferred, time.perf_counter() - start)


def _split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A batch's images in order, in at most `parts` batches of about one size."""
    size = -(-len(batch.indices) // parts)
    shares = []
    for start in range(0, len(batch.indices), size):
        end = start + size
        own = batch.targets[(batch.targets[:, 0] >= start) & (batch.targets[:, 0] < end)]
        own = own - own.new_tensor((start, 0, 0, 0, 0, 0))
        shares.append(Batch(batch.images[start:end], own, batch.indices[start:end], batch.letterboxes[start:end]))
    return shares


def check_classes(names: Sequence[str], wanted: Sequence[str], single_cls: bool, weights: str) -> None:
    """Refuse a network whose classes are not the data's: its mAP would mean nothing.

    Raises:
        UserError: another number of classes, or other names in their places.
    """
    if single_cls or tuple(names) == tuple(wanted):
        return
    if len(names) != len(wanted):
        raise UserError(f"{weights}: knows {len(names)} classes, the data has {len(wanted)}: "
                        "use the data YAML that it was trained on, or --single-cls")
    differing = next((n, a, b) for n, (a, b) in enumerate(zip(names, wanted, strict=True)) if a != b)
    warn(f"{weights}: class {differing[0]} is named {differing[1]} there and {differing[2]} in the data: scored by number")


def truth_of(split: Split, index: int) -> Truth:
    """An image's labels in its own pixels; crowds (COCO's) come last."""
    boxes, crowds = split.boxes[index].astype(np.float64), split.crowds[index].astype(np.float64)
    rows = np.concatenate((boxes, crowds))
    xyxy = cxcywh_to_xyxy(rows[:, 1:]) * np.tile(split.sizes[index], 2)
    area = None if split.areas is None else np.concatenate((split.areas[index], split.crowd_areas[index]))
    return Truth(xyxy, rows[:, 0].astype(np.int64), area, np.arange(len(rows)) >= len(boxes))
