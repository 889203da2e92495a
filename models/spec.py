"""A network as data: YAML rows -> frozen ModelSpec. Literals only: nothing in the file is evaluated, and no torch is needed."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.files import MODEL_FOLDERS, did_you_mean, find_file, read_yaml

IMAGE = -1  # the source row that stands for the input image
_KEYS = ("nc", "depth_multiple", "width_multiple", "anchors", "activation", "backbone", "head", "widths", "fused")
_IGNORED_KEYS = ("ch", "inplace", "yaml_file", "names")  # met in users' files; they say nothing new about the network here
_DETECT = "[[17, 20, 23], 1, Detect, [nc, anchors]]"
_LARGEST = 100_000  # of every setting
_MOST_BLOCKS = 1000  # over all rows, repeats counted; yolov5x6 has 96
_MOST_ARGS = 100  # of one row, nested ones counted
_MOST_WIDTHS = 1_000_000  # numbers, all layers together; a pruned yolov5x6 has some thousands
_WORDS = {"None": None, "none": None, "null": None, "True": True, "False": False}


@dataclass(frozen=True)
class LayerSpec:
    """One row `[from, number, module, args]`."""

    row: int
    source: int | tuple[int, ...]  # absolute rows; IMAGE for the input. A list in the YAML stays a tuple
    repeats: int  # depth-scaled
    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]  # from a mapping at the end of args
    place: str  # "yolov5s.yaml: row 12 (head 3)", for messages

    @property
    def sources(self) -> tuple[int, ...]:
        return self.source if isinstance(self.source, tuple) else (self.source,)


@dataclass(frozen=True)
class ModelSpec:
    """A network's rows and settings; `to_dict` gives the YAML's own shape back."""

    origin: str
    nc: int
    depth_multiple: float
    width_multiple: float
    anchors: int | tuple[tuple[float, ...], ...]  # anchors a level, or a row (w, h, w, h, …) in pixels for each level
    activation: str | None
    layers: tuple[LayerSpec, ...]
    rows: tuple[tuple[list[Any], ...], tuple[list[Any], ...]]  # backbone and head as written
    widths: Mapping[str, tuple[int | None, ...]]  # of a pruned network: layer -> its channels, see models/narrow.py
    fused: bool = False  # without batch norms, as train.py --qat leaves it: its layers, and those that widths name, are the fused network's

    def to_dict(self) -> dict[str, Any]:
        anchors = self.anchors if isinstance(self.anchors, int) else [list(level) for level in self.anchors]
        settings = {"nc": self.nc, "depth_multiple": self.depth_multiple, "width_multiple": self.width_multiple, "anchors": anchors}
        if self.activation:
            settings["activation"] = self.activation
        if self.fused:
            settings["fused"] = True
        if self.widths:
            settings["widths"] = {name: list(sizes) for name, sizes in self.widths.items()}
        return settings | {"backbone": [list(row) for row in self.rows[0]], "head": [list(row) for row in self.rows[1]]}

    def to_yaml(self) -> str:
        """A model YAML, a line for each row."""
        lines = []
        for key, value in self.to_dict().items():
            rows = value.items() if isinstance(value, dict) else [("-", row) for row in value] if isinstance(value, list) else None
            if rows is None:
                lines.append(f"{key}: {_in_one_line(value)}")
            else:
                lines += [f"{key}:", *(f"  {name if name == '-' else f'{_in_one_line(name)}:'} {_in_one_line(row)}" for name, row in rows)]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], origin: str, nc: int | None = None) -> ModelSpec:
        """Check a YAML-shaped mapping; `nc` overrides the file's class count.

        Raises:
            UserError: one line that names `origin`, the row and the likely mend.
        """
        for key in content:
            if key not in _KEYS + _IGNORED_KEYS:
                raise UserError(f"{origin}: unknown key {key}{did_you_mean(key, _KEYS)}")
        for key in ("backbone", "head"):
            if not isinstance(content.get(key), list) or not content[key]:
                raise UserError(f"{origin}: '{key}:' needs a list of rows [from, number, module, args]")
        if content.get("ch", 3) != 3:
            raise UserError(f"{origin}: ch: {content['ch']!r}: images have 3 channels here; leave it out")
        classes = nc if nc is not None else _number(content.get("nc", 80), "nc", origin, whole=True)
        depth = _number(content.get("depth_multiple", 1.0), "depth_multiple", origin)
        width = _number(content.get("width_multiple", 1.0), "width_multiple", origin)
        anchors = _anchors(content.get("anchors"), origin)
        act = content.get("activation")
        if act is not None and not isinstance(act, str):
            raise UserError(f"{origin}: activation must be a name such as nn.LeakyReLU(0.1), found {act!r}")
        fused = content.get("fused", False)
        if not isinstance(fused, bool):
            raise UserError(f"{origin}: fused must be true or false, found {fused!r}")
        rows = tuple(content["backbone"]), (*content["head"][:-1], _in_words(content["head"][-1], content.get("nc", 80), anchors))
        words = _WORDS | {"nc": classes, "anchors": anchors}
        layers = []
        for part, part_rows in zip(("backbone", "head"), rows, strict=True):
            for n, row in enumerate(part_rows):
                layers.append(_layer(row, len(layers), f"{origin}: row {len(layers)} ({part} {n})", depth, words))
        _check_blocks(layers, origin)
        _check_detect(layers, classes, anchors, origin)
        return cls(origin, classes, depth, width, anchors, act, tuple(layers), rows, _widths(content.get("widths") or {}, origin), fused)


def load_spec(name: str | Path, nc: int | None = None) -> ModelSpec:
    """The network of a YAML file, found as given, in models/, in models/hub/ or in models/timm/."""
    path = find_file(name, MODEL_FOLDERS, "model YAML")
    return ModelSpec.from_dict(read_yaml(path), path.name, nc)


def _in_one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).removesuffix("...\n").strip()


def _layer(row: Any, index: int, place: str, depth: float, words: Mapping[str, Any]) -> LayerSpec:
    if not isinstance(row, list) or len(row) != 4:
        raise UserError(f"{place}: expected [from, number, module, args], found {row!r}")
    source, number, module, args = row
    if not isinstance(module, str):
        raise UserError(f"{place}: the module must be a name, found {module!r}")
    place = f"{place} {module}"
    number = _number(number, "number", place, whole=True)
    if not isinstance(args, list):
        raise UserError(f"{place}: args must be a list, found {args!r}")
    _check_args(args, place)
    args = [_resolve(arg, words) for arg in args]
    kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
    if any(not isinstance(key, str) for key in kwargs):
        raise UserError(f"{place}: the mapping at the end of args needs names as keys, found {kwargs!r}")
    repeats = max(round(number * depth), 1) if number > 1 else number
    return LayerSpec(index, _source(source, index, place), repeats, module, tuple(args), kwargs, place)


def _source(source: Any, index: int, place: str) -> int | tuple[int, ...]:
    if isinstance(source, list):
        if not source:
            raise UserError(f"{place}: 'from' is an empty list; name the rows it takes")
        return tuple(_absolute(item, index, place) for item in source)
    return _absolute(source, index, place)


def _absolute(source: Any, index: int, place: str) -> int:
    if not isinstance(source, int) or isinstance(source, bool):
        raise UserError(f"{place}: 'from' must be a row number or -1 for the row before, found {source!r}")
    absolute = source + index if source < 0 else source
    if absolute >= index:
        known = f"rows 0 to {index - 1} (-1 is the row before)" if index else "the image, -1"
        raise UserError(f"{place}: 'from' {source} points at itself or forward; a row takes rows above it, here {known}")
    if absolute < IMAGE:
        raise UserError(f"{place}: 'from' {source} reaches before the first row; at row {index} the least is {-index - 1} (the image)")
    return absolute


def _check_args(args: list[Any], place: str) -> None:
    """Literals only: finite numbers, text, true, false, null, and lists and mappings of them."""
    rest = list(args)
    for count, arg in enumerate(rest):  # grows as nested values are met
        if count >= _MOST_ARGS:
            raise UserError(f"{place}: has over {_MOST_ARGS} arguments")
        if isinstance(arg, list):
            rest += arg
        elif isinstance(arg, dict):
            rest += arg.values()
        elif not isinstance(arg, str | int | float | None) or (isinstance(arg, float) and not math.isfinite(arg)):
            raise UserError(f"{place}: argument {arg!r} is no finite number, text, true, false or null")


def _resolve(arg: Any, words: Mapping[str, Any]) -> Any:
    """Words that stand for values (None, nc, anchors) from a fixed table; all else as it is."""
    if isinstance(arg, list):
        return [_resolve(item, words) for item in arg]
    if isinstance(arg, dict):
        return {key: _resolve(value, words) for key, value in arg.items()}
    return words.get(arg, arg) if isinstance(arg, str) else arg


def _number(value: Any, what: str, place: str, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= _LARGEST:
        raise UserError(f"{place}: {what} must be a {'whole ' if whole else ''}number above 0 and up to {_LARGEST:,}, "
                        f"found {value!r} (expressions are not evaluated)")
    return value


def _anchors(anchors: Any, origin: str) -> int | tuple[tuple[float, ...], ...]:
    if anchors is None:
        raise UserError(f"{origin}: 'anchors:' is missing; give a row of w,h pairs in pixels for each level, or their number (anchors: 3)")
    if isinstance(anchors, int):
        return _number(anchors, "anchors", origin, whole=True)
    if not isinstance(anchors, list | tuple) or not anchors:
        raise UserError(f"{origin}: anchors must be rows of w,h pairs or a whole number, found {anchors!r}")
    for n, level in enumerate(anchors):
        if not isinstance(level, list | tuple) or not level or len(level) % 2 or len(level) != len(anchors[0]):
            raise UserError(f"{origin}: anchors row {n}: expected w,h pairs, equally many in each row, found {level!r}")
        for value in level:
            _number(value, f"anchors row {n}", origin)
    return tuple(tuple(level) for level in anchors)


def _widths(widths: Any, origin: str) -> Mapping[str, tuple[int | None, ...]]:
    if not isinstance(widths, dict) or not all(isinstance(name, str) and isinstance(sizes, list | tuple) for name, sizes in widths.items()):
        raise UserError(f"{origin}: widths must name layers, each with a list of channel numbers, as prune.py writes them")
    if sum(map(len, widths.values())) > _MOST_WIDTHS:
        raise UserError(f"{origin}: widths: over {_MOST_WIDTHS:,} numbers")
    for name, sizes in widths.items():
        for size in sizes:
            if size is not None and (type(size) is not int or not 0 <= size <= _LARGEST):
                raise UserError(f"{origin}: widths of {name}: {size!r} is no whole number from 0 to {_LARGEST:,}, nor null")
    return {name: tuple(sizes) for name, sizes in widths.items()}


def _check_blocks(layers: list[LayerSpec], origin: str) -> None:
    blocks = sum(layer.repeats for layer in layers)
    if blocks > _MOST_BLOCKS:
        most = max(layers, key=lambda layer: layer.repeats)
        raise UserError(f"{origin}: {blocks} blocks, repeats counted, are over the limit of {_MOST_BLOCKS}: "
                        f"lower depth_multiple or the rows' numbers; most are of {most.place.partition(': ')[2]}, {most.repeats}")


def _check_detect(layers: list[LayerSpec], nc: int, anchors: int | tuple[tuple[float, ...], ...], origin: str) -> None:
    last = layers[-1]
    if last.module != "Detect":
        raise UserError(f"{origin}: the last row must be Detect, e.g. {_DETECT}; found {last.module}")
    for layer in layers[:-1]:
        if layer.module == "Detect":
            raise UserError(f"{layer.place}: only the last row may be Detect; give that one all levels, e.g. {_DETECT}")
    if not isinstance(last.source, tuple) or last.repeats != 1:
        raise UserError(f"{last.place}: takes a list of rows, once, e.g. {_DETECT}")
    if _as_tuples(last.args) != (nc, anchors) or last.kwargs:
        raise UserError(f"{last.place}: its arguments must be [nc, anchors], which stand for the file's settings; found {list(last.args)}")
    if not isinstance(anchors, int) and len(anchors) != len(last.sources):
        raise UserError(f"{last.place}: {len(last.sources)} levels but {len(anchors)} rows of anchors; give one row for each level")


def _in_words(row: Any, nc: Any, anchors: int | tuple[tuple[float, ...], ...]) -> Any:
    """A row of Detect with the file's own numbers as one that follows other classes and anchors."""
    if not (isinstance(row, list | tuple) and len(row) == 4 and row[2] == "Detect" and isinstance(row[3], list | tuple) and len(row[3]) == 2):
        return row
    words = ("nc" if row[3][0] == nc else row[3][0], "anchors" if _as_tuples(row[3][1]) == anchors else row[3][1])
    return [*row[:3], list(words)]


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value
