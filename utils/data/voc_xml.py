"""One Pascal VOC annotation file. Declarations (DOCTYPE, ENTITY) are refused, so no entity can swell it."""
from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocError(Exception):
    """A file that is no VOC annotation: one line with file and line number."""


class VocObject(NamedTuple):
    name: str
    difficult: bool
    xyxy: tuple[float, float, float, float]  # as written: pixels from 1, the last one included
    line: int


class _Handler:
    """Collects the texts of annotation/size and annotation/object; deeper ones (an object's parts) have other paths and stay out."""

    def __init__(self, parser: expat.XMLParserType) -> None:
        self._parser = parser
        self._path: list[str] = []
        self._text = ""
        self.size: dict[str, str] = {}
        self.objects: list[tuple[int, dict[str, str]]] = []
        parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = self._start, self._end, self._data
        parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = self._refuse

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        self._text = ""
        if self._path[1:] == ["object"]:
            self.objects.append((self._parser.CurrentLineNumber, {}))

    def _data(self, text: str) -> None:
        self._text += text

    def _end(self, tag: str) -> None:
        match self._path[1:]:
            case ["size", key]:
                self.size[key] = self._text.strip()
            case ["object", key] | ["object", "bndbox", key]:
                self.objects[-1][1].setdefault(key, self._text.strip())
        self._path.pop()
        self._text = ""

    def _refuse(self, *_: object) -> None:
        raise VocError("a declaration (DOCTYPE or ENTITY) is not accepted; remove it")


def read_voc_xml(file: Path) -> tuple[tuple[float, float], list[VocObject]]:
    """((width, height), objects); the size is (0, 0) where the file has none.

    Raises:
        VocError: unreadable, not XML, or an object without name or four finite numbers in order.
    """
    parser = expat.ParserCreate()
    handler = _Handler(parser)
    try:
        parser.Parse(file.read_bytes(), True)
    except VocError as error:
        raise VocError(f"{file}:{parser.CurrentLineNumber}: {error}") from None
    except expat.ExpatError as error:
        raise VocError(f"{file}:{error.lineno}: not valid XML: {expat.errors.messages[error.code]}") from None
    except OSError as error:
        raise VocError(f"{file}: {error.strerror}") from None
    try:
        size = float(handler.size.get("width") or 0), float(handler.size.get("height") or 0)
    except ValueError:
        raise VocError(f"{file}: size: width and height are not numbers") from None
    return size, [_read_object(file, line, texts) for line, texts in handler.objects]


def _read_object(file: Path, line: int, texts: dict[str, str]) -> VocObject:
    try:
        x1, y1, x2, y2 = (float(texts[corner]) for corner in _CORNERS)
        if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 < x1 or y2 < y1:
            raise ValueError
        return VocObject(texts["name"], texts.get("difficult") == "1", (x1, y1, x2, y2), line)
    except (KeyError, ValueError):
        raise VocError(f"{file}:{line}: an object needs a name and a bndbox with {', '.join(_CORNERS)} as finite numbers in order") from None
