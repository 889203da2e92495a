"""Speed of the label scan: many label files and image headers, verified cold (no label cache; files in the page cache) and from the cache.

python -m benchmarks.labels [--files 10000] [--boxes 8] [--repeats 3]
"""
from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.data.formats import list_images
from utils.data.images import check_image
from utils.data.labels import load_split
from utils.data.spec import DataSpec, load_data_spec
from utils.data.yolo_text import label_path, yolo_source
from utils.errors import script

_CLASSES = 80


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, help="label files and images")
    parser.add_argument("--boxes", type=int, default=8, help="boxes in a label file")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row; the median counts")
    return parser.parse_args(argv)


def make_data(root: Path, files: int, boxes: int) -> DataSpec:
    """JPEGs of 64x48 and label files with six decimals, as exporters write them."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    jpegs = [cv2.imencode(".jpg", rng.integers(0, 256, (48, 64, 3), np.uint8))[1].tobytes() for _ in range(16)]
    for n in range(files):
        (root / "images" / f"{n:06d}.jpg").write_bytes(jpegs[n % len(jpegs)])
        wh = rng.uniform(0.02, 0.4, (boxes, 2))
        rows = np.hstack((rng.integers(0, _CLASSES, (boxes, 1)), rng.uniform(wh / 2, 1 - wh / 2), wh))
        (root / "labels" / f"{n:06d}.txt").write_text("\n".join("{:.0f} {:.6f} {:.6f} {:.6f} {:.6f}".format(*row) for row in rows) + "\n")
    (root / "data.yaml").write_text(f"path: .\ntrain: images\nnc: {_CLASSES}\n")
    return load_data_spec(str(root / "data.yaml"))


def plain_scan(root: Path) -> None:
    """The reference: every file opened, split and checked on its own, every image's size asked of Pillow."""
    for image in list_images(root / "images"):
        with Image.open(image) as opened:
            assert min(opened.size) > 0
        with open(label_path(image, "labels")) as file:
            rows = np.array([line.split() for line in file.read().splitlines()], np.float32)
        assert rows.shape[1] == 5 and (rows >= 0).all() and (rows[:, 1:] <= 1).all() and (rows[:, 0] < _CLASSES).all()
        assert len(np.unique(rows, axis=0)) == len(rows)


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@script
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="labels-"))
    try:
        spec = make_data(root, args.files, args.boxes)
        images = list_images(root / "images")
        load_split(spec, "train", progress=False)  # writes the label cache and fills the page cache
        rows: dict[str, Callable[[], object]] = {
            "plain: file by file, Pillow's size": lambda: plain_scan(root),
            "label text alone": lambda: yolo_source([root / "images"], root, spec.names, spec.file).read(),
            "image headers alone": lambda: [check_image(image) for image in images],
            "whole scan, no cache": lambda: load_split(spec, "train", cache=False, progress=False),
            "whole scan, from the cache": lambda: load_split(spec, "train", progress=False),
        }
        seconds = {name: median_seconds(work, args.repeats) for name, work in rows.items()}
    finally:
        shutil.rmtree(root, ignore_errors=True)
    plain = next(iter(seconds.values()))
    print(f"{args.files} images with {args.boxes} boxes each; {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, 1 thread used, "
          f"Python {platform.python_version()}, numpy {np.__version__}; median of {args.repeats}")
    print(f"{'work':36s} {'ms':>8s} {'files/s':>9s} {'of plain':>9s}")
    for name, value in seconds.items():
        print(f"{name:36s} {value * 1e3:8.0f} {math.floor(args.files / value):9,d} {value / plain:9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
