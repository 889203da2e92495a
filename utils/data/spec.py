"""Data YAML -> DataSpec: what a data set is called, where it lies, which splits it has. Nothing of the data itself is read here."""
from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.data.formats import coco_names, read_coco_json
from utils.data.shapes import ensure_shapes
from utils.errors import UserError
from utils.files import ROOT, did_you_mean, find_file, is_writable, read_yaml

SPLITS = ("train", "val", "test")
FORMATS = ("yolo", "coco", "voc", "visdrone")
CHECKSUMS = {"sha256": 64, "sha1": 40, "md5": 32}  # hexadecimal digits
_KEYS = {"path", *SPLITS, "nc", "names", "format", "images", "download", "generate", "roboflow"}  # roboflow: a licence note in its exports
_BESIDE = ROOT.parent / "datasets"  # beside the clone, as YOLOv5 has it
_DOWNLOAD_KEYS = {"url", "to", *CHECKSUMS}


@dataclass(frozen=True)
class Download:
    url: str
    to: str = "."  # folder below the data set's root
    checksum: tuple[str, str] | None = None  # algorithm, hex digest


@dataclass(frozen=True)
class DataSpec:
    """A data YAML, checked. The data may be missing: `root` is then where a download puts them."""

    file: Path
    names: tuple[str, ...]  # empty only where a missing COCO JSON is to give them
    format: str  # one of FORMATS
    root: Path
    splits: dict[str, tuple[str, ...]]  # split -> folders, list files or JSON files, as written
    images: dict[str, str]  # split -> folder of images, where a format needs it named
    download: tuple[Download, ...]
    scripted: bool  # download: is a script, as in YOLOv5's files; nothing that a file contains is ever executed
    tried: tuple[Path, ...]  # every place where the root was looked for

    @property
    def nc(self) -> int:
        return len(self.names)

    def find(self, entry: str) -> Path:
        """The existing file or folder that `entry` names.

        Raises:
            UserError: there is none; the line lists every place tried and what to run.
        """
        if found := self.found(entry):
            return found
        raise UserError(f"{self.file}: {entry} is missing; looked at {', '.join(map(str, self._places(entry)))}; {self.mend()}")

    def found(self, entry: str) -> Path | None:
        """`find`; None where there is none."""
        return next((place for place in self._places(entry) if place.exists()), None)

    def _places(self, entry: str) -> list[Path]:
        roots, absolute = (self.root, *self.tried), Path(entry).expanduser()
        places = [absolute] if absolute.is_absolute() else [*(r / e for e in (entry, _shorter(entry)) for r in roots), Path.cwd() / entry]
        return list(dict.fromkeys(map(_normal, places)))

    def mend(self) -> str:
        """How to come by the data."""
        if self.download:
            return f"fetch it with: python -m utils.data.download --data {self.file.name} (or --download)"
        if self.scripted:
            return "its download: is a script, which is not run here: run it yourself and name the folder with 'path:', --data-root or YOLO_DATASETS"
        return "mend 'path:', or name the folder that holds the data sets with --data-root or YOLO_DATASETS"


def find_data_yaml(name: str) -> Path:
    """The data YAML of that name, here or in data/; the suffix may be left out."""
    return find_file(name if Path(name).suffix else f"{name}.yaml", [ROOT / "data"], "data YAML").absolute()


def load_data_spec(name: str, data_root: str | None = None) -> DataSpec:
    """Find `name` (here or in data/), check it and find its root: beside the YAML, in the data root, in datasets/ in the clone or beside it, in
    the working folder.

    Args:
        data_root: the folder that holds data sets; the environment's YOLO_DATASETS where None.

    Raises:
        UserError: no such YAML, or a mistake in it.
    """
    file = find_data_yaml(name)
    content = read_yaml(file)
    _reject_unknown(file, content, _KEYS)
    kind = content.get("format", "yolo")
    if kind not in FORMATS:
        raise UserError(f"{file}: format: {kind}: use one of {', '.join(FORMATS)}{did_you_mean(kind, FORMATS)}")
    splits = {key: _texts(file, key, content[key]) for key in SPLITS if content.get(key)}
    if not splits:
        raise UserError(f"{file}: names no split; add train: and val:")
    names = _names(file, content, kind)
    roots, home = _possible_roots(file, content, data_root)
    spec = DataSpec(file, names, kind, _choose_root(roots, splits) or home, splits, _image_folders(file, content.get("images"), splits),
                    *_downloads(file, content.get("download")), tuple(roots))
    return spec if names else replace(spec, names=_names_of_json(spec))


def _reject_unknown(file: Path, content: dict[str, Any], known: Iterable[str]) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{file}: unknown key {key!r}{did_you_mean(str(key), known)}; known are {', '.join(sorted(known))}")


def _texts(file: Path, key: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str) and v for v in values):
        raise UserError(f"{file}: {key}: expected a path or a list of paths, found {value!r}")
    return tuple(values)


def _names(file: Path, content: dict[str, Any], kind: str) -> tuple[str, ...]:
    names, nc = content.get("names"), content.get("nc")
    if nc is not None and (not isinstance(nc, int) or isinstance(nc, bool) or nc < 1):
        raise UserError(f"{file}: nc: expected a whole number from 1, found {nc!r}")
    if isinstance(names, dict):
        names = {int(key) if isinstance(key, str) and key.isdecimal() else key: name for key, name in names.items()}
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f"{file}: names: the keys must be 0 to {len(names) - 1} without a gap, found {', '.join(map(str, names))}")
        names = [names[i] for i in range(len(names))]
    if names is None and nc and kind == "yolo":
        names = [f"class{i}" for i in range(nc)]
    if names is None and kind == "coco":
        return ()
    if isinstance(names, list) and any(isinstance(n, bool) for n in names):
        raise UserError(f"{file}: names: to YAML yes, no, on and off are truth values: put such a name in quotes")
    if not isinstance(names, list) or not names or not all(isinstance(n, str | int | float) for n in names):
        raise UserError(f"{file}: names: expected a list of class names, found {names!r}")
    if nc is not None and nc != len(names):
        raise UserError(f"{file}: nc is {nc} but names has {len(names)}; make them agree, or drop nc")
    names = tuple(map(str, names))
    if kind != "yolo" and len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"{file}: names: {twice} stands twice; {kind} labels name their class, so every name must be its own")
    return names


def _names_of_json(spec: DataSpec) -> tuple[str, ...]:
    """The categories of the first JSON that is there; the smaller splits are asked first."""
    entries = [entry for split in reversed(SPLITS) for entry in spec.splits.get(split, ())]
    file = next((spec.root / entry for entry in entries if (spec.root / entry).is_file()), None)
    return coco_names(read_coco_json(file)["categories"])[1] if file else ()


def _image_folders(file: Path, value: Any, splits: Iterable[str]) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return dict.fromkeys(splits, value)
    if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        _reject_unknown(file, value, SPLITS)
        return value
    raise UserError(f"{file}: images: expected a folder, or split: folder lines, found {value!r}")


def _downloads(file: Path, value: Any) -> tuple[tuple[Download, ...], bool]:
    """What URLs bring, and whether a script stands there."""
    items = value if isinstance(value, list) else [value] if value else []
    found, scripted = [], False
    for item in items:
        if isinstance(item, str) and not item.startswith(("http://", "https://")):
            scripted = True
            continue
        item = {"url": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not str(item.get("url", "")).startswith(("http://", "https://")):
            raise UserError(f"{file}: download: expected a URL or a mapping with url, to and sha256, found {item!r}")
        _reject_unknown(file, item, _DOWNLOAD_KEYS)
        sums = [(kind, str(item[kind]).lower()) for kind in CHECKSUMS if item.get(kind) is not None]
        for kind, digest in sums:
            if not re.fullmatch(f"[0-9a-f]{{{CHECKSUMS[kind]}}}", digest):
                raise UserError(f"{file}: download: {kind}: expected {CHECKSUMS[kind]} hexadecimal digits in quotes, found {item[kind]!r}")
        found.append(Download(item["url"], str(item.get("to") or "."), sums[0] if sums else None))
    return tuple(found), scripted


def _data_roots(data_root: str | None) -> list[Path]:
    given = data_root or os.environ.get("YOLO_DATASETS")
    return [*([Path(given).expanduser().absolute()] if given else []), ROOT / "datasets"]


def _possible_roots(file: Path, content: dict[str, Any], data_root: str | None) -> tuple[list[Path], Path]:
    """Where the data set may lie, best first, and where it belongs if it lies nowhere."""
    path = content.get("path")
    if path is not None and not isinstance(path, str):
        raise UserError(f"{file}: path: expected a folder, found {path!r}")
    if content.get("generate"):
        home = _generate(file, content["generate"], data_root)
        return [home], home
    if path and Path(path).expanduser().is_absolute():
        return [Path(path).expanduser()], Path(path).expanduser()
    roots = _data_roots(data_root)
    if path:
        places = [file.parent / path, *(p for r in (*roots, _BESIDE) for p in (r / path, r / Path(path).name)), Path.cwd() / path]
    else:
        places = [file.parent, *(r / file.stem for r in (*roots, _BESIDE)), Path.cwd()]
    return list(dict.fromkeys(map(_normal, places))), _normal(roots[0] / (Path(path).name if path else file.stem))


def _normal(path: Path) -> Path:
    """Without `..`, which would else hide in labels' paths and messages; links stay as they are."""
    return Path(os.path.normpath(path))


def _choose_root(roots: list[Path], splits: dict[str, tuple[str, ...]]) -> Path | None:
    """The first place that holds a split as written; else, written shorter."""
    entries = [entry for split in splits.values() for entry in split]
    forms = entries, [_shorter(entry) for entry in entries]
    return next((root for form in forms for root in roots if any((root / entry).exists() for entry in form)), None)


def _shorter(entry: str) -> str:
    """Exports often write ../train/images and mean train/images."""
    return entry.removeprefix("../")


def _generate(file: Path, what: Any, data_root: str | None) -> Path:
    if what != "shapes":
        raise UserError(f"{file}: generate: {what!r}: the only generated data set is shapes")
    places = [root / "shapes" for root in _data_roots(data_root)]
    ready = [place for place in places if place.is_dir()]
    writable = [place for place in places if is_writable(place)]
    return ensure_shapes((ready + writable + [Path.cwd() / "datasets" / "shapes"])[0])

