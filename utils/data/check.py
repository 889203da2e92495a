"""What a data set holds and what is wrong with it.

python -m utils.data.check --data bccd.yaml [--split train val] [--quick]
"""
from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.data.images import ImageError, read_image
from utils.data.labels import Split, load_split
from utils.data.spec import SPLITS, DataSpec, load_data_spec
from utils.errors import script
from utils.flags import Parser
from utils.log import info

_BAR = 40  # characters of the longest bar
_COCO_SIDES = (32, 96)  # small below, large from; pixels


def check_split(spec: DataSpec, split: str, quick: bool) -> tuple[list[str], dict[str, list[str]]]:
    """The report of one split as lines, and content hash -> images."""
    data = load_split(spec, split, cache=False, progress=False)
    lines = [f"{split}: {data.report.summary()}", *_shapes(data), *_histogram(data)]
    problems = list(data.report.problems)
    contents: dict[str, list[str]] = defaultdict(list)
    if not quick:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for image, (digest, problem) in zip(data.images, pool.map(_inspect, data.images), strict=True):
                if problem:
                    problems.append(problem)
                if digest:
                    contents[digest].append(image)
    lines += [f"  {len(problems)} problems" if problems else "  no problem", *(f"    {problem}" for problem in problems)]
    return lines, contents


def _inspect(image: str) -> tuple[str | None, str | None]:
    """Content hash, and what is wrong with the pixels."""
    try:
        digest = hashlib.blake2b(Path(image).read_bytes(), digest_size=16).hexdigest()
        read_image(image)
    except ImageError as error:
        return digest, f"{error}: broken"
    except OSError as error:
        return None, f"{image}: {error.strerror}"
    return digest, None


def _shapes(data: Split) -> list[str]:
    """Image sizes, and box sizes in the images' pixels."""
    common = Counter(map(tuple, data.sizes.tolist())).most_common()
    shown = ", ".join(f"{w}x{h} ({count})" for (w, h), count in common[:4]) + (f" and {len(common) - 4} more" if len(common) > 4 else "")
    lines = [f"  image sizes: {shown}"]
    per_image = np.array([len(boxes) for boxes in data.boxes])
    if per_image.sum():
        wh = np.concatenate([boxes[:, 3:5] * size for boxes, size in zip(data.boxes, data.sizes, strict=True)])
        area = wh.prod(1)
        small, large = (area < _COCO_SIDES[0] ** 2).mean(), (area >= _COCO_SIDES[1] ** 2).mean()
        low, middle, high = np.percentile(np.sqrt(area), (5, 50, 95))
        lines += [
            f"  boxes an image: {per_image.mean():.1f}, at most {per_image.max()}",
            f"  box sizes, square root of the area in px: 5 % below {low:.0f}, median {middle:.0f}, 5 % above {high:.0f}; "
            f"small {small:.0%}, medium {1 - small - large:.0%}, large {large:.0%}"]
    return lines


def _histogram(data: Split) -> list[str]:
    classes = np.concatenate([boxes[:, 0] for boxes in data.boxes]).astype(int) if data.boxes else np.empty(0, int)
    counts = np.bincount(classes, minlength=len(data.names))
    width = max(map(len, data.names))
    return [f"  {name:{width}s} {count:8,d} {'#' * round(_BAR * count / max(counts.max(), 1))}".rstrip()
            for name, count in zip(data.names, counts, strict=True)]


def _identical(contents: Iterable[tuple[str, dict[str, list[str]]]]) -> list[str]:
    """Images of the same bytes, within a split and between splits."""
    everywhere: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for split, images in contents:
        for digest, paths in images.items():
            everywhere[digest] |= {(split, path) for path in paths}
    groups = [sorted(group) for group in everywhere.values() if len({path for _, path in group}) > 1]
    shared = Counter(tuple(sorted({split for split, _ in group})) for group in everywhere.values())
    lines = [f"identical images: {len(groups)} groups"]
    lines += ["  " + " = ".join(f"{path} ({split})" for split, path in group) for group in sorted(groups)]
    for splits, count in sorted(shared.items()):
        if len(splits) > 1:
            lines.append(f"{' and '.join(splits)} share {count} images: a score on them says little about new ones")
    return lines


@script
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Report a data set's images, boxes, classes, duplicates and faults.")
    parser.add_argument("--data", required=True, help="data YAML, here or in data/")
    parser.add_argument("--split", nargs="+", choices=SPLITS, help="splits to check (default: all)")
    parser.add_argument("--data-root", help="folder of data sets (default: YOLO_DATASETS, else datasets/ in the project)")
    parser.add_argument("--quick", action="store_true", help="headers only: no decoding of every image, no search for identical ones")
    args = parser.parse_args(argv)
    spec = load_data_spec(args.data, args.data_root)
    info(f"{spec.file}: {spec.format} labels, {spec.nc} classes, in {spec.root}")
    contents = []
    for split in args.split or spec.splits:
        lines, images = check_split(spec, split, args.quick)
        contents.append((split, images))
        info("\n".join(lines))
    if not args.quick:
        info("\n".join(_identical(contents)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
