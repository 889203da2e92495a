"""Label formats: what YOLO, VisDrone, COCO and Pascal VOC files say, as one table of boxes. Nothing is corrected here; see labels.py.

A `LabelSource` first names the files that decide its content, cheaply, so that a cache can be asked; `read` then opens them.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.images import IMAGE_SUFFIXES
from utils.data.voc_xml import VocError, read_voc_xml
from utils.errors import UserError
from utils.files import did_you_mean


@dataclass
class RawLabels:
    """Every box of a split as written. `rows` stand in the order of `owner`."""

    images: list[str]
    rows: np.ndarray  # (R, 5) float64 class, cx, cy, w, h in units of the frame
    owner: np.ndarray  # (R,) int64, index into images
    place: Callable[[int], str]  # row -> "file:line"
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    frames: np.ndarray | None = None  # (N, 2) width, height that the rows are measured in; 0: the image's own size; None: rows are normalised
    crowd: np.ndarray | None = None  # (R,) bool
    areas: np.ndarray | None = None  # (R,) square pixels
    image_ids: list[int | str] | None = None
    unlabelled: int = 0  # images without a label file or entry
    difficult: int = 0  # objects left out because the format marks them so
    problems: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)  # what a user must mend before the set can be used


@dataclass(frozen=True)
class LabelSource:
    files: list[str]
    read: Callable[[], RawLabels]


def list_images(folder: Path) -> list[str]:
    """Every image in a folder and below it, sorted; hidden ones left out."""
    found: list[str] = []
    folders: list[tuple[str, frozenset[str]]] = [(os.fspath(folder), frozenset())]
    while folders:
        path, above = folders.pop()
        real = os.path.realpath(path)
        if real in above:
            continue  # a link to a folder that it lies in
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append((entry.path, above | {real}))
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    found.append(entry.path)
    return sorted(found)


def read_list(file: Path, root: Path) -> list[str]:
    """The non-empty lines of a list file as paths: absolute, or relative to the file's folder, or to the data set's root."""
    places = os.fspath(file.parent), os.fspath(root)

    def find(line: str) -> str:
        tried = (os.path.join(place, entry) for entry in (line, line.replace("\\", "/")) for place in places)  # the second as Windows writes it
        return os.path.normpath(next(filter(os.path.exists, tried), os.path.join(places[1], line)))

    return [find(line) for line in _lines(file)]


def _lines(file: Path) -> list[str]:
    """Of a list that Windows' editor may have written; the non-empty ones."""
    try:
        return [line for line in map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()) if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read as a list of images: {error}") from None


def images_of(places: Iterable[Path], root: Path) -> list[str]:
    """Images of folders and list files, each image once."""
    paths = [path for place in places for path in (list_images(place) if place.is_dir() else read_list(place, root))]
    return list(dict.fromkeys(paths))


# --- COCO JSON ---------------------------------------------------------------------------------------------------------------------------------


def read_coco_json(file: Path) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
        for key, columns in {"images": ("id", "file_name"), "annotations": ("image_id", "category_id", "bbox"), "categories": ("id", "name")}.items():
            for n, item in enumerate(content[key]):
                if not all(column in item for column in columns):
                    raise UserError(f"{file}: {key}[{n}] lacks one of {', '.join(columns)}")
        for n, category in enumerate(content["categories"]):
            if not isinstance(category["id"], int | float) or category["id"] % 1:
                raise UserError(f"{file}: categories[{n}]: id {category['id']!r} is not a whole number")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: can't be read as COCO JSON: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: a COCO JSON has the lists images, annotations and categories") from None
    return content


def coco_names(categories: Sequence[dict[str, Any]]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Category ids in ascending order, and their names: the order of the class index."""
    ordered = sorted(categories, key=lambda c: c["id"])
    return tuple(int(c["id"]) for c in ordered), tuple(str(c["name"]) for c in ordered)


def coco_source(jsons: Sequence[Path], folder: Path | None, names: tuple[str, ...], yaml: Path) -> LabelSource:
    """Images lie in `folder`, or beside each JSON."""
    folders = {folder} if folder else {file.parent for file in jsons}
    files = [*map(str, jsons), *(path for f in sorted(folders) for path in list_images(f))]
    return LabelSource(files, lambda: _read_coco(jsons, folder, names, yaml))


def _read_coco(jsons: Sequence[Path], folder: Path | None, names: tuple[str, ...], yaml: Path) -> RawLabels:
    raw = RawLabels([], np.empty((0, 5)), np.empty(0, np.int64), str, names, (), image_ids=[])
    rows, owner, crowd, areas, places, frames = [], [], [], [], [], []
    for file in jsons:
        content = read_coco_json(file)
        ids, found = coco_names(content["categories"])
        if (names and found != names) or (raw.category_ids and ids != raw.category_ids):
            wrong = next((f"{a} for {b}" for a, b in zip(names, found, strict=False) if a != b), f"{len(names)} names for {len(found)}")
            raise UserError(f"{yaml}: names: differ from the categories of {file} in ascending id ({wrong}); drop names: to take the JSON's")
        raw.names, raw.category_ids = found, ids
        class_of = {category: n for n, category in enumerate(ids)}
        index_of = {image["id"]: len(raw.images) + n for n, image in enumerate(content["images"])}
        raw.images += [os.path.normpath((folder or file.parent) / str(image["file_name"])) for image in content["images"]]
        raw.image_ids += [image["id"] for image in content["images"]]
        frames += [(image.get("width") or 0, image.get("height") or 0) for image in content["images"]]
        for n, item in enumerate(content["annotations"]):
            place = f"{file}: annotation {item.get('id', f'number {n}')}"
            mistake = _coco_mistake(item, class_of, index_of)
            if mistake:
                raw.mistakes.append(f"{place}: {mistake}")
                continue
            x, y, w, h = map(float, item["bbox"])
            rows.append((class_of[item["category_id"]], x + w / 2, y + h / 2, w, h))
            owner.append(index_of[item["image_id"]])
            crowd.append(bool(item.get("iscrowd", 0)))
            areas.append(float(w * h if item.get("area") is None else item["area"]))
            places.append(place)
    order = np.argsort(owner, kind="stable")
    raw.rows, raw.owner = np.array(rows, np.float64).reshape(-1, 5)[order], np.array(owner, np.int64)[order]
    raw.crowd, raw.areas = np.array(crowd, bool)[order], np.array(areas, np.float64)[order]
    raw.place = lambda row: places[order[row]]
    raw.frames = np.array(frames, np.float64).reshape(-1, 2)
    raw.unlabelled = len(raw.images) - len(set(owner))
    # Several JSONs that each count from 1, or of which one has numbers and one has text, which no one can sort.
    if len({*raw.image_ids}) < len(raw.image_ids) or len({*map(type, raw.image_ids)}) > 1:
        raw.image_ids = None
    return raw


def _coco_mistake(item: dict[str, Any], class_of: dict[Any, int], index_of: dict[Any, int]) -> str | None:
    box = item["bbox"]
    if item["category_id"] not in class_of:
        return f"category_id {item['category_id']} is not among the categories"
    if item["image_id"] not in index_of:
        return f"image_id {item['image_id']} is not among the images"
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return f"bbox {box!r} is not [x, y, width, height]"
    if not np.isfinite(box).all() or min(box[2:]) < 0:
        return f"bbox {box!r} has a negative or not finite number"
    if not isinstance(item.get("area"), int | float | None):
        return f"area {item['area']!r} is not a number"
    return None


# --- Pascal VOC --------------------------------------------------------------------------------------------------------------------------------


def voc_source(places: Sequence[Path], folder: Path | None, names: tuple[str, ...], yaml: Path) -> LabelSource:
    """`places` are folders of XML files or lists of stems (ImageSets/Main/train.txt); images lie in `folder`, JPEGImages, images or beside."""
    xmls = [xml for place in places for xml in _voc_xmls(place)]
    images, listings = [], {}
    for xml in xmls:
        home = folder or next((xml.parent.parent / n for n in ("JPEGImages", "images") if (xml.parent.parent / n).is_dir()), xml.parent)
        if home not in listings:
            listings[home] = {Path(path).stem: path for path in list_images(home)} if home.is_dir() else {}
        images.append(listings[home].get(xml.stem, str(home / f"{xml.stem}.jpg")))
    lists = [str(place) for place in places if place.is_file()]
    return LabelSource([*lists, *map(str, xmls), *images], lambda: _read_voc(xmls, images, names, yaml))


def _voc_xmls(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(place.glob("*.xml"))
    # a class's list (aeroplane_train.txt) has a second column, -1 where the image lacks it; every image counts here
    stems = [re.sub(r"\s+(-1|0|1)$", "", line) for line in _lines(place)]
    home = next((p / "Annotations" for p in place.parents if (p / "Annotations").is_dir()), place.parent)
    return [home / f"{stem}.xml" for stem in stems]


def _read_voc(xmls: Sequence[Path], images: list[str], names: tuple[str, ...], yaml: Path) -> RawLabels:
    raw = RawLabels(images, np.empty((0, 5)), np.empty(0, np.int64), str, names, tuple(range(len(names))))
    class_of = {name: n for n, name in enumerate(names)}
    rows, owner, places, frames = [], [], [], []
    for n, xml in enumerate(xmls):
        if not xml.is_file():
            raw.unlabelled += 1
            frames.append((0, 0))
            continue
        try:
            size, objects = read_voc_xml(xml)
        except VocError as error:
            raw.mistakes.append(str(error))
            size, objects = (0, 0), []
        frames.append(size)
        for item in objects:
            if item.name not in class_of:
                raw.mistakes.append(f"{xml}:{item.line}: class {item.name!r} is not among {yaml.name}'s names{did_you_mean(item.name, names)}")
            elif item.difficult:
                raw.difficult += 1
            else:
                # VOC's pixels count from 1 and the last one is inside the box; some tools count from 0
                x1, y1, x2, y2 = max(item.xyxy[0] - 1, 0), max(item.xyxy[1] - 1, 0), item.xyxy[2], item.xyxy[3]
                rows.append((class_of[item.name], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1))
                owner.append(n)
                places.append(f"{xml}:{item.line}")
    raw.rows, raw.owner = np.array(rows, np.float64).reshape(-1, 5), np.array(owner, np.int64)
    raw.place = places.__getitem__
    raw.frames = np.array(frames, np.float64).reshape(-1, 2)
    return raw
