"""One network in all its formats: the checkpoint and the exported files beside it, each scored, timed and started anew."""
from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch

from utils.config import CompareConfig
from utils.cpu import cpu_has_native_bf16, cpu_int8, cpu_name, cpu_threads
from utils.data.augment import letterbox
from utils.data.labels import Split
from utils.data.open import open_splits, val_loader
from utils.data.scenes import render
from utils.errors import UserError, first_line
from utils.evaluate.validate import check_classes, validate
from utils.export.backends import OPENVINO_SUFFIX, is_exported, needs_gpu
from utils.export.metadata import GraphNms
from utils.files import ROOT, find_file, size_bytes, write_csv
from utils.log import info, warn
from utils.measure.timing import Latency, Timings, time_interleaved
from utils.nms import VALIDATION, NmsOptions, non_max_suppression
from utils.plots.formats import draw_formats
from utils.runner import Runner

_ROUNDS, _SECONDS = 50, 60.0  # of timing, at most
_STARTS = 4  # of which the first, that fills the page cache, does not count
_VAL_BATCH = 32
_IDLE = ("cfg", "weights", "epochs", "budget_minutes", "batch_size", "seeds", "hyp", "batches", "runtimes", "layers", "device", "precision")


class OpenWeights(Protocol):
    """What models/weights.py opens."""

    names: tuple[str, ...]
    network: Any
    pad_stride: int | None
    fixed: tuple[int, int] | None
    device: torch.device
    dtype: torch.dtype
    description: str
    nms: GraphNms | None

    @property
    def runner(self) -> Runner: ...

    def val_size(self, asked: int | None) -> int | tuple[int, int]: ...

    def tell_limits(self, options: NmsOptions) -> None: ...

    def image_size(self, asked: Sequence[int] | None) -> tuple[int, int]: ...


Open = Callable[..., OpenWeights]  # weights, device, precision, data, data_root, at_once


@dataclass
class FormatRow:
    """A file in one precision, and what is known of it.

    Attributes:
        precision: that it computes in where it is told so; fp16 where its weights are, whatever the processor makes of them.
        start_s: from `detect.py`'s command for one image to its exit.
        problem: why something is missing; empty where all is known.
        suppresses: boxes itself.
        frame: height and width of its images, where it takes others than those that are compared.
    """

    path: Path
    precision: str
    description: str = ""
    map50: float | None = None
    map: float | None = None
    latency: Latency | None = None
    start_s: float | None = None
    problem: str = ""
    suppresses: bool = False
    frame: str = ""

    @property
    def name(self) -> str:
        return f"{self.path.name} {self.precision}{' nms' * self.suppresses}{self.frame and f' {self.frame}'}"

    @property
    def mib(self) -> float:
        return size_bytes(self.path) / 2**20


def find_formats(weights: Path) -> list[FormatRow]:
    """The checkpoint and the files beside it that are named after it, such as best.onnx and best_int8_openvino_model, and not after another
    checkpoint there; those that compute in another precision when asked to, in both. Engines, for GPUs, are left out: CPUs are compared."""
    stems = sorted((path.stem for path in weights.parent.glob("*.pt")), key=len, reverse=True)

    def owner(path: Path) -> str | None:
        return next((stem for stem in stems if path.name.startswith((f"{stem}_", f"{stem}."))), None)

    named = sorted(path for path in weights.parent.iterdir() if is_exported(path) and not needs_gpu(path) and owner(path) == weights.stem)
    whole = [path for path in named if not any(word in path.name for word in (".mismatch", ".unchecked", ".failed"))]
    return [FormatRow(path, precision) for path in (weights, *whole) for precision in _precisions(path, weights.stem)]


def _precisions(path: Path, stem: str) -> tuple[str, ...]:
    int8 = "_int8" in path.name.removeprefix(stem)  # the checkpoint's own name may say so too
    chooses = path.suffix == ".pt" or (path.name.endswith(OPENVINO_SUFFIX) and not int8)
    return ("fp32", "bf16") if chooses and cpu_has_native_bf16() else ("int8",) if int8 else ("fp32",)


class FormatComparison:
    """`run()` fills the rows and writes the report: table, formats.csv and formats.png."""

    def __init__(self, config: CompareConfig, open_weights: Open) -> None:
        self.config, self._open_weights = config, open_weights
        plain = CompareConfig(device=config.device if config.device == "cpu" else "")
        if idle := [f"--{name.replace('_', '-')}" for name in _IDLE if getattr(config, name) != getattr(plain, name)]:
            raise UserError(f"--formats compares one checkpoint's files, on the CPU: leave out {' '.join(idle)}")
        if is_exported(config.formats):
            raise UserError(f"--formats {config.formats}: is an exported file: name the checkpoint that it lies beside")
        self.weights = find_file(config.formats, [ROOT], "weights file")
        self.rows = find_formats(self.weights)
        self.imgsz = self._open_weights(str(self.weights), "cpu", "fp32", config.data, config.data_root, None).val_size(config.imgsz)
        self.folder = Path(config.project).expanduser() / config.name

    @property
    def failed(self) -> bool:
        return any(row.problem for row in self.rows)

    def run(self) -> None:
        info(f"{self.weights.name} and {len({row.path for row in self.rows}) - 1} exported files beside it, at {self.imgsz} px; {cpu_name()}, "
             f"{cpu_threads()} threads; the processor has {cpu_int8()}")
        squares = any([self._takes_squares_only(row) for row in self.rows])
        if self.config.data:
            (split,) = open_splits(self.config, ("val",))
            if squares:
                info("scored on squares, as some of the files take nothing else: val.py's own batches of the others are padded less")
            if others := [row.name for row in self.rows if row.frame]:
                info(f"{', '.join(others)}: takes no other image size than that, and is scored and timed with it")
            for row in self.rows:
                if not row.problem:
                    with _Noted(row):
                        self._score(row, split, squares)
        image = render(0).image
        self._start(image)
        timings = self._time(image)
        self._report(timings)

    def _open(self, row: FormatRow, at_once: int | None = None) -> OpenWeights:
        weights = self._open_weights(str(row.path), "cpu", _asked(row), self.config.data, self.config.data_root, at_once)
        stored = getattr(weights.network, "metadata", None)
        if stored and (stored.precision, row.precision) == ("fp16", "fp32"):
            row.precision = "fp16"
        row.suppresses = weights.nms is not None
        row.frame = "" if weights.fixed in (None, (self.imgsz, self.imgsz)) else "x".join(map(str, weights.fixed))
        return weights

    def _takes_squares_only(self, row: FormatRow) -> bool:
        with _Noted(row):
            return self._open(row).fixed is not None and not row.frame
        return False

    def _size(self, weights: OpenWeights) -> int | tuple[int, int]:
        return weights.val_size(None if weights.fixed else self.imgsz)

    def _score(self, row: FormatRow, split: Split, squares: bool) -> None:
        weights = self._open(row)
        weights.tell_limits(VALIDATION.with_one_class() if self.config.single_cls else VALIDATION)
        check_classes(weights.names, split.names, self.config.single_cls, str(row.path))
        imgsz = self._size(weights)
        loader = val_loader(split, imgsz, _VAL_BATCH, None if squares else weights.pad_stride, self.config.workers, weights.device)
        metrics = validate(weights.network, loader, split, weights.device, weights.dtype, single_cls=self.config.single_cls).metrics()
        row.map50, row.map = metrics["mAP50"], metrics["mAP50-95"]
        info(f"{row.name}: mAP50 {row.map50:.4f}, mAP50-95 {row.map:.4f}")

    def _start(self, image: np.ndarray) -> None:
        """`detect.py` on one image, each in a process of its own, in turn."""
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "image.png"
            cv2.imwrite(str(picture), image)
            seconds: list[list[float]] = [[] for _ in self.rows]
            for _ in range(_STARTS):
                for row, taken in zip(self.rows, seconds, strict=True):
                    if not row.problem:
                        with _Noted(row):
                            taken.append(self._started(row, picture))
        for row, taken in zip(self.rows, seconds, strict=True):
            if taken[1:]:
                row.start_s = statistics.median(taken[1:])

    def _started(self, row: FormatRow, picture: Path) -> float:
        flags = ["--weights", str(row.path), "--source", str(picture), "--project", str(picture.parent), "--device", "cpu",
                 "--precision", _asked(row), *([] if row.frame else ["--imgsz", str(self.imgsz)])]
        flags += [word for flag in ("data", "plugin") if (value := getattr(self.config, flag)) for word in (f"--{flag}", value)]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, str(ROOT / "detect.py"), *flags], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"detect.py ended with exit code {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
        return time.perf_counter() - start

    def _time(self, image: np.ndarray) -> Timings | None:
        """One image from pixels to boxes, with all threads, in turn."""
        runs = {}
        for row in self.rows:
            with _Noted(row):
                weights = self._open(row, at_once=1)
                row.description = weights.description
                size = self._size(weights)
                padded, _ = letterbox(image, size if isinstance(size, tuple) else (size, size), None)
                run = _one(weights.runner, padded[None])
                run()
                runs[row.name] = run
        if not runs:
            return None
        timings = time_interleaved(runs, _ROUNDS, budget_s=_SECONDS)
        for row in self.rows:
            row.latency = timings.latencies.get(row.name)
        return timings

    def _report(self, timings: Timings | None) -> None:
        info("\n".join(table(self.rows)))
        for row in self.rows:
            info(f"{row.name}: {row.problem or row.description}")
        if timings and timings.remark:
            warn(timings.remark)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_csv(self.folder / "formats.csv", _COLUMNS, ((*_cells(row), row.frame or self.imgsz, cpu_name(), cpu_threads()) for row in self.rows))
        if not self.config.noplots:
            bars = {"mAP50-95": [row.map for row in self.rows], "latency, ms": [row.latency and row.latency.p50_ms for row in self.rows],
                    "start-up, s": [row.start_s for row in self.rows], "size, MiB": [row.mib for row in self.rows]}
            draw_formats(self.folder / "formats.png", [row.name for row in self.rows], bars, f"{self.weights.name} at {self.imgsz} px, {cpu_name()}")


def _asked(row: FormatRow) -> str:
    """What its runtime is to compute in."""
    return "bf16" if row.precision == "bf16" else "fp32"


def _one(runner: Runner, images: np.ndarray) -> Callable[[], object]:
    options = NmsOptions()
    return lambda: [non_max_suppression(boxes, options) for boxes in runner.run(images, options.conf_thres)]


class _Noted:
    """Puts what goes wrong in its block on a format's row, and goes on: a runtime may fail in any way."""

    def __init__(self, row: FormatRow) -> None:
        self.row = row

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self.row.problem = str(error) if isinstance(error, UserError) else first_line(error)
            warn(f"{self.row.name}: {self.row.problem}; the others go on")
            return True
        return False


_TITLES = ("MiB", "mAP50", "mAP50-95", "ms", "spread", "speed", "start s")


def table(rows: Sequence[FormatRow]) -> Iterator[str]:
    """A line for each format; speed and latency's spread, (p90 - p10) / median, of one image; speed is that of the first row's times so much."""
    wide = max(len(row.name) for row in rows)
    yield f"{'format':<{wide}}" + "".join(f"{title:>10}" for title in _TITLES)
    first = rows[0].latency
    for row in rows:
        taken = row.latency
        cells = (f"{row.mib:.2f}", _shown(row.map50, ".4f"), _shown(row.map, ".4f"), _shown(taken and taken.p50_ms, ".1f"),
                 _shown(taken and taken.spread, ".0%"), _shown(taken and first and first.p50_ms / taken.p50_ms, ".2f"), _shown(row.start_s, ".2f"))
        yield f"{row.name:<{wide}}" + "".join(f"{cell:>10}" for cell in cells)


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


_COLUMNS = ("file", "precision", "MiB", "mAP50", "mAP50-95", "latency_ms", "spread", "start_s", "runtime", "problem", "imgsz", "machine", "threads")


def _cells(row: FormatRow) -> tuple[str, ...]:
    taken = row.latency
    figures = (row.mib, row.map50, row.map, taken and taken.p50_ms, taken and taken.spread, row.start_s)
    return row.path.name, row.precision, *("" if f is None else f"{f:.6g}" for f in figures), row.description, row.problem
