"""What validation writes for other programs: YOLO text files and COCO's results JSON."""
from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.boxes import xyxy_to_cxcywh
from utils.data.labels import Split
from utils.evaluate.matching import Detections
from utils.evaluate.validate import ValResult
from utils.files import atomic_write


def yolo_lines(found: Detections, size: np.ndarray, with_conf: bool) -> str:
    """`class cx cy w h [confidence]`, normalised by `size` (width, height); one line a box."""
    boxes = xyxy_to_cxcywh(found.xyxy) / np.tile(size, 2)
    rows = np.concatenate((boxes, found.conf[:, None]), 1) if with_conf else boxes
    return "".join(f"{int(c)} {' '.join(f'{v:.6g}' for v in row)}\n" for c, row in zip(found.cls, rows, strict=True))


def save_txt(folder: Path, result: ValResult, split: Split, with_conf: bool) -> None:
    """labels/NAME.txt for each image; an image without a box gets none."""
    labels = folder / "labels"
    labels.mkdir(exist_ok=True)
    for index, found in zip(result.indices, result.detections, strict=True):
        if len(found.conf):
            (labels / f"{Path(split.images[index]).stem}.txt").write_text(yolo_lines(found, split.sizes[index], with_conf))


def save_json(path: Path, result: ValResult, split: Split) -> None:
    """COCO's results format: image_id, category_id, bbox (x, y, w, h in pixels), score; unrounded, so that COCO's tools give the printed mAP."""
    rows = []
    for index, found in zip(result.indices, result.detections, strict=True):
        xywh = np.concatenate((found.xyxy[:, :2], found.xyxy[:, 2:] - found.xyxy[:, :2]), 1)
        rows += [{"image_id": split.image_ids[index], "category_id": split.category_ids[c], "bbox": box, "score": score}
                 for c, box, score in zip(found.cls.tolist(), xywh.tolist(), found.conf.tolist(), strict=True)]
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(rows))


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
    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        truth = COCO()
        truth.dataset = {"images": [{"id": split.image_ids[i]} for i in result.indices], "annotations": annotations,
                         "categories": [{"id": c} for c in split.category_ids]}
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return float(scorer.stats[0]), float(scorer.stats[1])
