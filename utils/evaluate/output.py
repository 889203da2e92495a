"""What validation writes for other programs: YOLO text files and COCO's results JSON."""
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.boxes import xyxy_to_cxcywh
from utils.evaluate.matching import Detections
from utils.files import atomic_write

if TYPE_CHECKING:
    from utils.data.labels import Split
    from utils.evaluate.validate import ValResult


def yolo_lines(found: Detections, size: np.ndarray, with_conf: bool) -> str:
    """`class cx cy w h [confidence]`, normalised by `size` (width, height); one line a box."""
    boxes = xyxy_to_cxcywh(found.xyxy) / np.tile(size, 2)
    rows = np.concatenate((boxes, found.conf[:, None]), 1) if with_conf else boxes
    return "".join(f"{int(c)} {' '.join(f'{v:.6g}' for v in row)}\n" for c, row in zip(found.cls, rows, strict=True))


def save_labels(folder: Path, name: str, found: Detections, size: np.ndarray, with_conf: bool) -> None:
    """folder/name.txt with YOLO's lines; an image without a box has none, not even of an earlier run."""
    path = folder / f"{name}.txt"
    if not len(found.cls):
        path.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yolo_lines(found, size, with_conf), encoding="utf-8")


def save_txt(folder: Path, result: ValResult, split: Split, with_conf: bool) -> None:
    """labels/NAME.txt for each image; where names repeat in several folders, labels/NAME_2.txt and so on."""
    names = _unique([Path(image).stem for image in split.images])
    for index, found in zip(result.indices, result.detections, strict=True):
        save_labels(folder / "labels", names[index], found, split.sizes[index], with_conf)


def _unique(stems: list[str]) -> list[str]:
    """The first of a name keeps it, in the order of the split; the others get the next number that no other image is called, in capitals or not."""
    own, taken, names = {stem.casefold() for stem in stems}, set(), []
    for stem in stems:
        name, n = stem, 1
        while name.casefold() in taken or (n > 1 and name.casefold() in own):
            n += 1
            name = f"{stem}_{n}"
        taken.add(name.casefold())
        names.append(name)
    return names


def save_json(path: Path, result: ValResult, split: Split) -> None:
    """COCO's results format: image_id, category_id, bbox (x, y, w, h in pixels), score; unrounded, so that COCO's tools give the printed mAP."""
    rows = []
    for index, found in zip(result.indices, result.detections, strict=True):
        xywh = np.concatenate((found.xyxy[:, :2], found.xyxy[:, 2:] - found.xyxy[:, :2]), 1)
        rows += [{"image_id": split.image_ids[index], "category_id": split.category_ids[c], "bbox": box, "score": score}
                 for c, box, score in zip(found.cls.tolist(), xywh.tolist(), found.conf.tolist(), strict=True)]
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(rows))
