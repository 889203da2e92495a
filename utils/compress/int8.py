"""From a trained network to an int8 file that is worth having: written, scored, and its most sensitive layers kept float until it is."""
from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import nn

from utils.compress.calibration import CalibrationImages
from utils.compress.onnx_int8 import OnnxQuantizer
from utils.compress.openvino_int8 import OpenvinoQuantizer
from utils.compress.rounding import Range
from utils.compress.tflite_int8 import TfliteQuantizer
from utils.errors import UserError, foreign_errors
from utils.export.backends import open_network
from utils.export.formats import FORMATS, ExportJob, Format
from utils.export.metadata import ExportMetadata
from utils.files import atomic_folder, atomic_write
from utils.log import info
from utils.network import Network

_MOST_FLOAT = 0.25  # of the layers: an int8 file with more float ones gains too little to be worth having


class Scores(NamedTuple):
    """On one set of images."""

    map50: float
    map: float

    def drop_from(self, other: Scores) -> float:
        """In points of mAP50-95: 1.0 is from 0.51 to 0.50."""
        return 100 * (other.map - self.map)


class Attempt(NamedTuple):
    """An int8 file: what it scores, and the layers that stayed float in it."""

    kept: tuple[str, ...]
    scores: Scores
    drop: float  # points of mAP50-95 below the float file


class Quantizer(Protocol):
    """A float file, to int8 files that differ in which layers stay float.

    Attributes:
        layers: those that can be int8, by the names that they have in the network.
        weight_levels: on each side of 0.
    """

    layers: tuple[str, ...]
    weight_levels: int

    def __init__(self, source: Path, network: nn.Module, images: CalibrationImages, folder: Path,
                 ranges: Mapping[str, Range] | None = None) -> None: ...

    def write(self, path: Path, metadata: ExportMetadata) -> None: ...


QUANTIZERS: dict[str, tuple[type[Quantizer], tuple[str, ...]]] = {  # by format, and the packages that it needs beyond the format's
    "onnx": (OnnxQuantizer, ()),
    "openvino": (OpenvinoQuantizer, ("nncf",)),
    "tflite": (TfliteQuantizer, ("ai_edge_quantizer",)),
}


def int8_format(name: str) -> Format:
    """The format of this name, where all that int8 needs is installed.

    Raises:
        UserError: which pip install it lacks, or there is no int8 in this format.
    """
    if name not in QUANTIZERS:
        raise UserError(f"{name}: no int8 files of this format are written here; {', '.join(QUANTIZERS)} ones run on ARM too")
    kind = FORMATS[name]
    kind = dataclasses.replace(kind, packages=(*kind.packages, *QUANTIZERS[name][1]))
    if missing := kind.missing():
        raise UserError(f"{name}: {missing}")
    return kind


def attempts(
    write_and_score: Callable[[tuple[str, ...]], Scores],
    reference: Scores,
    max_drop: float,
    layers: Sequence[str],
    ranking: Callable[[], Sequence[str]],
) -> Iterator[Attempt]:
    """Int8 files, each with one more layer in float, until one loses at most `max_drop` points or a quarter of the layers is float.

    Args:
        write_and_score: makes the file in which these layers stay float.
        reference: of the float file.
        layers: those that can be int8.
        ranking: layers, the most sensitive first; asked only where the first attempt loses too much.
    """
    kept: tuple[str, ...] = ()
    order: Iterator[str] | None = None
    while True:
        scores = write_and_score(kept)
        attempt = Attempt(kept, scores, scores.drop_from(reference))
        yield attempt
        if attempt.drop <= max_drop or len(kept) + 1 > len(layers) * _MOST_FLOAT:
            return
        order = order or iter([layer for layer in ranking() if layer in layers])
        following = next(order, None)
        if following is None:
            return
        kept = (*kept, following)


class Int8Files:
    """A float file and the int8 files made of it, in a folder for a while."""

    def __init__(
        self, job: ExportJob, kind: Format, images: CalibrationImages, folder: Path, ranges: Mapping[str, Range] | None = None
    ) -> None:
        """
        Args:
            job: of the float file.
            ranges: of what the layers read, where the network was trained to compute in int8 (train.py --qat).

        Raises:
            UserError: the network can't be converted.
        """
        self.kind, self._folder, self._metadata = kind, folder, job.metadata
        self.float_path = self._new("float")
        with foreign_errors(f"{kind.name}: this network can't be converted"):
            kind.write(job, self.float_path)
            self._quantizer = QUANTIZERS[kind.name][0](self.float_path, job.network, images, folder, ranges)
        self.path_of: dict[tuple[str, ...], Path] = {}  # by the layers that stay float

    @property
    def layers(self) -> tuple[str, ...]:
        return self._quantizer.layers

    @property
    def weight_levels(self) -> int:
        return self._quantizer.weight_levels

    def write(self, kept: tuple[str, ...]) -> Path:
        """An int8 file in which these layers stay float.

        Raises:
            UserError: the network can't be quantized.
        """
        path = self._new(f"int8-{len(kept)}")
        with foreign_errors(f"{self.kind.name}: this network can't be quantized"):
            self._quantizer.write(path, dataclasses.replace(self._metadata, precision="int8", float_layers=kept))
        self.path_of[kept] = path
        return path

    def _new(self, name: str) -> Path:
        path = self._folder / f"{name}{self.kind.suffix}"
        if self.kind.is_folder:
            path.mkdir()
        return path


def best_attempt(
    files: Int8Files, score: Callable[[Network], Scores], reference: Scores, max_drop: float, ranking: Callable[[], Sequence[str]]
) -> Attempt:
    """The first int8 file that loses at most `max_drop` points, else the one that loses least; a line tells of each."""

    def write_and_score(kept: tuple[str, ...]) -> Scores:
        return score(open_network(files.write(kept)))

    made = []
    for attempt in attempts(write_and_score, reference, max_drop, files.layers, ranking):
        made.append(attempt)
        info(f"int8{f', with {attempt.kept[-1]} in float too' if attempt.kept else ''}: mAP50-95 {attempt.scores.map:.4f}, "
             f"{attempt.drop:+.2f} points lost of {reference.map:.4f}")
    return min(made, key=lambda attempt: attempt.drop) if made[-1].drop > max_drop else made[-1]


def put(made: Path, path: Path, kind: Format) -> None:
    """Copy a finished file, or the files of a folder, to its place, whole or not at all."""
    with (atomic_folder if kind.is_folder else atomic_write)(path) as temporary:
        if kind.is_folder:
            for file in made.iterdir():
                shutil.copyfile(file, temporary / file.name)
        else:
            shutil.copyfile(made, temporary)
