"""COCO's own tool on our results file: an independent check of the printed mAP."""
from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.data.labels import Split
from utils.evaluate.validate import ValResult


def pycocotools_scores(predictions: Path, result: ValResult, split: Split) -> tuple[float, float]:
    """mAP50-95 and mAP50 that COCO's own tool gives the file of `save_json`: an independent check of the printed ones.

    -1 is COCO's word for nothing to score. No boxes at all score 0.
    """
    if not any(len(found.conf) for found in result.detections):
        return 0.0, 0.0
    annotations = []
    for index, truth in zip(result.indices, result.truths, strict=True):
        wh = truth.xyxy[:, 2:] - truth.xyxy[:, :2]
        area = wh.prod(1) if truth.area is None else truth.area
        crowd = np.zeros(len(wh), bool) if truth.crowd is None else truth.crowd
        for box, c, a, is_crowd in zip(np.concatenate((truth.xyxy[:, :2], wh), 1).tolist(), truth.cls, area.tolist(), crowd.tolist(), strict=True):
            annotations.append({"id": len(annotations) + 1, "image_id": split.image_ids[index], "category_id": split.category_ids[c],
                                "bbox": box, "area": a, "iscrowd": int(is_crowd)})
    return cocoeval({"images": [{"id": split.image_ids[i]} for i in result.indices], "annotations": annotations,
                     "categories": [{"id": c} for c in split.category_ids]}, predictions)


def cocoeval(dataset: dict[str, list[dict[str, Any]]], predictions: Path) -> tuple[float, float]:
    """mAP50-95 and mAP50 by pycocotools, of a results file against COCO's images, annotations and categories."""
    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return float(scorer.stats[0]), float(scorer.stats[1])
