"""The embedded data set: drawn at first use in seconds and identical everywhere.

`python -m utils.data.shapes --out DIR [--sheet sheet.png]` draws it by hand.
"""
from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.data.scenes import NAMES, SIZES, Scene, render
from utils.errors import UserError, script
from utils.files import atomic_write
from utils.flags import Parser
from utils.log import info

_KIND = "light-yolo shapes"
VERSION = f"{_KIND} 1"  # raise the number with every change of a pixel or a label: it makes users' copies be drawn again
SPLITS = {"train": 256, "val": 64, "test": 64}

_COLOURS = ((60, 220, 255), (255, 200, 80), (110, 255, 110), (120, 140, 255), (255, 150, 255), (255, 255, 160))  # BGR, one for each class
_ON_SHEET = 8
_MARKER = "VERSION"
_STALE_S = 3600  # a temporary folder this old was left by a killed process
_PNG = (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY)  # noise has no repeats to look for


def ensure_shapes(root: Path, progress: bool = True) -> Path:
    """Make the data set at `root` unless it is there already in this version: `images/{train,val,test}/*.png`, `labels/{…}/*.txt`.

    The folder appears whole or not at all, also when two processes ask at once.

    Raises:
        UserError: `root` holds something else.
    """
    root = Path(root)
    if _version(root) == VERSION:
        return root
    taken = root.is_file() or (root.is_dir() and any(root.iterdir()))
    if taken and not (_version(root) or "").startswith(_KIND):
        raise UserError(f"{root}: holds other files than the generated shapes; name a new folder or remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{root.name}.drawing-"
    for left in root.parent.glob(f"{prefix}*"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=root.parent))
    try:
        if progress:
            info(f"shapes: drawing {sum(SPLITS.values())} images in {root}, once")
        _write(temporary / "new")
        _publish(temporary / "new", root, temporary / "old")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _version(root: Path) -> str | None:
    try:
        return (root / _MARKER).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _seed(split: str, index: int) -> int:
    return 1_000_000 * list(SPLITS).index(split) + index


def _write(root: Path) -> None:
    for split, count in SPLITS.items():
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(count):
            scene = render(_seed(split, i))
            (images / f"{i:05}.png").write_bytes(cv2.imencode(".png", scene.image, _PNG)[1].tobytes())
            (labels / f"{i:05}.txt").write_text(_label(scene), encoding="utf-8")
    (root / _MARKER).write_text(VERSION + "\n", encoding="utf-8")


def _label(scene: Scene) -> str:
    """YOLO lines: class, centre and size as shares of the image."""
    height, width = scene.image.shape[:2]
    lines = []
    for name, (x1, y1, x2, y2) in zip(scene.classes, scene.boxes, strict=True):
        shares = (x1 + x2) / (2 * width), (y1 + y2) / (2 * height), (x2 - x1) / width, (y2 - y1) / height
        lines.append(f"{name} " + " ".join(f"{share:.6f}" for share in shares) + "\n")
    return "".join(lines)


def _publish(new: Path, root: Path, old: Path) -> None:
    """Rename `new` to `root`; where another process was first, its equal set stays."""
    if _version(root) != VERSION and root.exists():
        with contextlib.suppress(FileNotFoundError):  # the other process has just moved it
            root.rename(old)
    try:
        new.rename(root)
    except OSError:
        if _version(root) != VERSION:
            raise


def draw_sheet(scenes: Sequence[Scene], columns: int = 4) -> np.ndarray:
    """A contact sheet, BGR: the scenes centred in square cells, with their boxes and class names."""
    side, gap = max(map(max, SIZES)), 6
    rows = -(-len(scenes) // columns)
    sheet = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), 255, np.uint8)
    for i, scene in enumerate(scenes):
        height, width = scene.image.shape[:2]
        top, left = i // columns * (side + gap) + (side - height) // 2, i % columns * (side + gap) + (side - width) // 2
        sheet[top : top + height, left : left + width] = _with_boxes(scene)
    return sheet


def _with_boxes(scene: Scene) -> np.ndarray:
    image, font, scale = scene.image.copy(), cv2.FONT_HERSHEY_SIMPLEX, 0.34
    for name, (x1, y1, x2, y2) in zip(scene.classes, scene.boxes.tolist(), strict=True):
        colour = _COLOURS[name]
        cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), colour, 1)
        (wide, high), _ = cv2.getTextSize(NAMES[name], font, scale, 1)
        left, top = min(x1, image.shape[1] - wide - 2), max(y1 - high - 4, 0)
        cv2.rectangle(image, (left, top), (left + wide + 1, top + high + 3), colour, cv2.FILLED)
        cv2.putText(image, NAMES[name], (left + 1, top + high + 1), font, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return image


@script
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Draw the embedded data set of shapes.")
    parser.add_argument("--out", type=Path, required=True, help="folder for images/ and labels/")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet of labelled test images, as PNG")
    args = parser.parse_args(argv)
    ensure_shapes(args.out)
    if args.sheet:
        scenes = (render(_seed("test", i)) for i in itertools.count())
        crowded = itertools.islice((s for s in scenes if len(s.boxes) > 3 and s.image.shape == (256, 256, 3)), _ON_SHEET)
        sheet = draw_sheet(list(crowded))
        sheet = sheet & 0xF0 | sheet >> 4  # 16 levels are dithered by the noise, and the PNG is a third as large
        with atomic_write(args.sheet) as temporary:
            temporary.write_bytes(cv2.imencode(".png", sheet, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
