"""A checkpoint's scores on the splits of a comparison, kept beside it: scored once, again only when the file changes."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.labels import Split
from utils.evaluate.matching import Detections
from utils.evaluate.validate import ValResult
from utils.files import atomic_write
from utils.plots.run import SHOWN_CONF

_ON_SHEET = 4


@dataclass(frozen=True)
class Score:
    """Of one checkpoint on one split; 0 to 1."""

    metrics: dict[str, float]  # precision, recall, f1, mAP50, mAP50-95
    class_ap: list[float | None]  # mAP50-95 of each class, None where the split has none of it
    sheet: list[list[list[float]]]  # for each of `sheet_images`, the boxes above SHOWN_CONF: x1, y1, x2, y2, conf, cls


def sheet_images(split: Split) -> list[int]:
    """The few images that every network is shown on, spread over the split."""
    count = len(split.images)
    return np.unique(np.linspace(0, count - 1, min(_ON_SHEET, count)).round().astype(int)).tolist()


def score_of(result: ValResult, split: Split) -> Score:
    place = {index: n for n, index in enumerate(result.indices)}
    sheet = [_boxes(result.detections[place[index]]) for index in sheet_images(split)]
    ap = [None if np.isnan(value) else float(value) for value in result.scores.per_class_ap]
    return Score(result.metrics(), ap, sheet)


def _boxes(found: Detections) -> list[list[float]]:
    shown = found.conf >= SHOWN_CONF
    return np.column_stack((found.xyxy[shown], found.conf[shown], found.cls[shown])).round(4).tolist()


def scored(
    weights: Path, kept: Path, splits: Mapping[str, Split], under: Mapping[str, Any], evaluate: Callable[[Path], Mapping[str, ValResult]]
) -> dict[str, Score]:
    """Scores by split, from `kept` where weights and circumstances are those that it was written for.

    Args:
        kept: the JSON file of the scores.
        under: what they depend on beside the weights.
        evaluate: weights -> a result for each split.
    """
    stat = weights.stat()
    key = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, **under}
    if (old := _read(kept)) and old.get("of") == key:
        return {name: Score(**content) for name, content in old["scores"].items()}
    scores = {name: score_of(result, splits[name]) for name, result in evaluate(weights).items()}
    with atomic_write(kept) as temporary:
        temporary.write_text(json.dumps({"of": key, "scores": {name: asdict(score) for name, score in scores.items()}}))
    return scores


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}  # scored anew
