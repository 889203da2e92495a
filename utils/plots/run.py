"""The pictures of a run: the data it starts from, its curves, and what the network finds beside the truth."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from utils.boxes import cxcywh_to_xyxy
from utils.data.dataset import Sample
from utils.data.images import ImageError, read_image
from utils.data.labels import Split
from utils.draw import Tile, image_grid, palette
from utils.evaluate.confusion import confusion_matrix
from utils.evaluate.matching import Detections, Truth
from utils.evaluate.validate import ValResult
from utils.plots.curves import plot_confusion, plot_metric_curve, plot_pr_curve
from utils.plots.training import plot_labels

_SHEETS = 3
SHOWN_CONF = 0.25


def draw_data(run_dir: Path, split: Split, dataset: Dataset, batch_size: int) -> None:
    """labels.jpg, and train_batch0.jpg … as the network sees them: augmented, with their boxes."""
    plot_labels(split.boxes, split.names, run_dir / "labels.jpg")
    per_sheet = min(batch_size, 16)
    for n in range(min(_SHEETS, -(-len(dataset) // per_sheet))):
        indices = range(n * per_sheet, min((n + 1) * per_sheet, len(dataset)))
        image_grid([_sample_tile(dataset[0, i], split) for i in indices], run_dir / f"train_batch{n}.jpg")


def _sample_tile(sample: Sample, split: Split) -> Tile:
    height, width = sample.image.shape[:2]
    xyxy = cxcywh_to_xyxy(sample.boxes[:, 1:]) * np.array((width, height, width, height))
    cls = sample.boxes[:, 0].astype(int)
    return Tile(np.ascontiguousarray(sample.image[..., ::-1]), xyxy, [split.names[c] for c in cls], [palette(c) for c in cls],
                Path(split.images[sample.index]).name)


def draw_validation(run_dir: Path, result: ValResult, split: Split) -> None:
    """PR, P, R and F1 curves, the confusion matrix, and sheets of truth beside prediction."""
    plot_pr_curve(result.curves, split.names, run_dir / "PR_curve.png")
    for metric, name in (("precision", "P_curve"), ("recall", "R_curve"), ("f1", "F1_curve")):
        plot_metric_curve(result.curves, metric, split.names, run_dir / f"{name}.png")
    matrix = confusion_matrix(result.truths, result.detections, len(split.names))
    plot_confusion(matrix, split.names, run_dir / "confusion_matrix.png")
    pairs = 8
    for n in range(min(_SHEETS, -(-len(result.indices) // pairs))):
        tiles = []
        for k in range(n * pairs, min((n + 1) * pairs, len(result.indices))):
            tiles += _pair(result.truths[k], result.detections[k], split, result.indices[k])
        image_grid(tiles, run_dir / f"val_batch{n}.jpg", columns=4)


def _pair(truth: Truth, found: Detections, split: Split, index: int) -> list[Tile]:
    path = split.images[index]
    try:
        image = read_image(path)
    except ImageError:
        return []  # reported when it was read for scoring
    shown = found.conf >= SHOWN_CONF
    labels = [f"{split.names[c]} {conf:.2f}" for c, conf in zip(found.cls[shown], found.conf[shown], strict=True)]
    name = Path(path).name
    return [
        Tile(image, truth.xyxy, [split.names[c] for c in truth.cls], [palette(int(c)) for c in truth.cls], f"{name}: truth"),
        Tile(image, found.xyxy[shown], labels, [palette(int(c)) for c in found.cls[shown]], f"{name}: predicted"),
    ]
