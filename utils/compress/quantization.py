"""A whole quantization: PyTorch, the float file and the int8 file on the same images, and the int8 file in its place if it is good enough."""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from utils.compress.calibration import CalibrationImages
from utils.compress.int8 import Attempt, Int8Files, Scores, best_attempt, put
from utils.compress.rounding import Range, measure_ranges
from utils.compress.sensitivity import Sensitivity, layer_sensitivities, write_sensitivities
from utils.config import DEFAULT_IMGSZ, QuantizeConfig, for_next, quoted
from utils.cpu import cpu_int8
from utils.data.open import open_splits, val_loader
from utils.device import machine
from utils.errors import UserError
from utils.evaluate.validate import check_classes, validate
from utils.export.backends import open_network
from utils.export.formats import ExportJob, Format
from utils.export.metadata import ExportMetadata
from utils.files import is_writable, size_bytes
from utils.log import info, warn
from utils.measure.timing import Latency, Timings, time_interleaved
from utils.network import Network, infer
from utils.plots.sensitivity import draw_sensitivities

_CPU = torch.device("cpu")
_SENSITIVITY_IMAGES = 8
_ROUNDS, _SECONDS = 50, 60.0  # of timing, at most
_FLOAT_MAY_LOSE = 0.01  # of mAP50-95: a float file computes what PyTorch computes


class Row(NamedTuple):
    """A line of the table."""

    name: str
    scores: Scores
    bytes: int


class Trained(Protocol):
    """What models/weights.py makes of a checkpoint."""

    path: Path
    model: Any  # float32, in eval mode, on the CPU
    imgsz: int | None
    int8: bool  # fine-tuned for it


class Quantization:
    """A network and its data, to int8 files of one format or several."""

    def __init__(self, config: QuantizeConfig, trained: Trained) -> None:
        """
        Raises:
            UserError: no such data, or not of this network; or nothing may be written beside the checkpoint.
        """
        train, self.val = open_splits(config, ("train", "val"))
        check_classes(trained.model.names, self.val.names, config.single_cls, config.weights)
        imgsz = trained.model.whole_strides(config.imgsz or trained.imgsz or DEFAULT_IMGSZ)
        network = self.network = trained.model.fused().requires_grad_(False).to(memory_format=torch.channels_last)
        self.config, self.weights, self.tuned = config, trained.path, trained.int8
        self._sensitivities: dict[int, list[Sensitivity]] = {}  # by levels
        if not is_writable(folder := self.weights.absolute().parent):
            raise UserError(f"{folder}: the int8 file is written beside the weights, and nothing may be written there: copy the checkpoint elsewhere")
        self.images = CalibrationImages.of(train, config.calib, imgsz, config.seed, config.data)
        stride = network.pad_stride if config.dynamic else None
        self.loader = val_loader(self.val, imgsz, config.batch_size, stride, config.workers, _CPU)
        self.job = ExportJob(network, ExportMetadata.of(
            network, (imgsz, imgsz), dynamic=config.dynamic, precision="fp32", source=self.weights.name))

    def run(self, kind: Format) -> bool:
        """Write the int8 file of a format; whether it loses no more than it may."""
        if missing := kind.missing(self.job):
            raise UserError(f"{kind.name}: {missing}")
        config, stem = self.config, self.weights.with_suffix("")
        tuned = " (fine-tuned for int8)" if self.tuned else ""
        info(f"int8: {self.weights.name}{tuned} to {kind.name}, calibrated on {len(self.images)} training images of "
             f"{' x '.join(map(str, self.job.metadata.imgsz))} px; {machine(_CPU)}; the processor has {cpu_int8()}")
        pytorch = self._pytorch  # first: its loader's workers must not be forked beside another runtime's threads
        if not pytorch.map:
            raise UserError(f"{self.weights}: finds nothing on the val images of {config.data}, so that int8 can't be judged: train it first, or "
                            "check --data")
        with TemporaryDirectory() as folder:
            files = Int8Files(self.job, kind, self.images, Path(folder), self._ranges)
            reference = self.score(open_network(files.float_path))
            if reference.map < pytorch.map - _FLOAT_MAY_LOSE:
                raise UserError(f"{self.weights}: its {kind.name} file has an mAP50-95 of {reference.map:.4f} before anything is rounded, where "
                                f"PyTorch has {pytorch.map:.4f}: python export.py --weights {quoted(self.weights)} --include {kind.name} shows "
                                "how they differ")
            levels = files.weight_levels
            best = best_attempt(files, self.score, reference, config.max_drop, lambda: [layer for layer, _ in self.sensitivities(levels)])
            made = files.path_of[best.kept]
            timings = self._time({"PyTorch fp32": self.network, "float": self._alone(files.float_path), "int8": self._alone(made)})
            rows = [Row("PyTorch fp32", pytorch, _tensor_bytes(self.network)), Row("float", reference, size_bytes(files.float_path)),
                    Row("int8", best.scores, size_bytes(made))]
            info(table(rows, kind.name, timings))
            reached = best.drop <= config.max_drop
            good, failed = (stem.with_name(f"{stem.name}_int8{ending}{kind.suffix}") for ending in ("", ".failed"))
            path, other = (good, failed) if reached else (failed, good)
            put(made, path, kind)
            if other.exists():
                warn(f"{other}: is of an earlier run: not of these weights, or not of these settings")
        if config.sensitivity:
            self._draw(stem, best, self.sensitivities(levels))
        self._conclude(best, path, reached, f"{max(map(len, files.path_of))} of {len(files.layers)} layers")
        return reached

    @functools.cached_property
    def _ranges(self) -> dict[str, Range] | None:
        """As the network was trained with, if it was: they are a function of its weights and these images, so that no file need keep them."""
        return measure_ranges(self.network, map(torch.from_numpy, self.images.shown("ranges"))) if self.tuned else None

    @functools.cached_property
    def _pytorch(self) -> Scores:
        return self.score(self.network)

    def score(self, network: Network) -> Scores:
        metrics = validate(network, self.loader, self.val, _CPU, torch.float32, single_cls=self.config.single_cls).metrics()
        return Scores(metrics["mAP50"], metrics["mAP50-95"])

    def sensitivities(self, levels: int) -> list[Sensitivity]:
        """Of weights in so many steps on each side of 0; on training images, so that validation stays a judge of what it did not choose."""
        if levels not in self._sensitivities:
            self._sensitivities[levels] = layer_sensitivities(self.network, torch.from_numpy(self.images.first(_SENSITIVITY_IMAGES)), levels)
        return self._sensitivities[levels]

    def _alone(self, path: Path) -> Network:
        """The file as one caller runs it, with all threads."""
        return open_network(path, at_once=1)

    def _time(self, networks: dict[str, Network]) -> Timings:
        """One image through each, in turn."""
        image = torch.from_numpy(self.images.first(1)).mul(255).byte()

        def run(network: Network, images: Tensor) -> Callable[[], object]:
            return lambda: infer(network, images, _CPU, torch.float32)

        layouts = {name: image.contiguous(memory_format=torch.channels_last) if name == "PyTorch fp32" else image for name in networks}
        return time_interleaved({name: run(network, layouts[name]) for name, network in networks.items()}, _ROUNDS, budget_s=_SECONDS)

    def _draw(self, stem: Path, best: Attempt, sensitivities: Sequence[Sensitivity]) -> None:
        spreadsheet, picture = (stem.with_name(f"{stem.name}_int8_sensitivity{ending}") for ending in (".csv", ".png"))
        write_sensitivities(spreadsheet, sensitivities, best.kept)
        order = {name: n for n, (name, _) in enumerate(self.network.named_modules())}
        bars = sorted(sensitivities, key=lambda sensitivity: order[sensitivity.layer])
        draw_sensitivities(picture, bars, best.kept, f"{self.weights.name}: one layer in int8 at a time")
        info(f"sensitivity of each layer: {spreadsheet} and .png")

    def _conclude(self, best: Attempt, path: Path, reached: bool, most: str) -> None:
        """`most`: how many layers were kept in float where it was most."""
        kept = f"; in float, the most sensitive first: {', '.join(best.kept)}" if best.kept else ""
        if reached:
            info(f"results: {path}, {best.drop:+.2f} points of mAP50-95 lost{kept}")
            info(f"    python val.py --weights {quoted(path)} --data {quoted(self.config.data)}{for_next(self.config)}")
        else:
            warn(f"int8 loses {best.drop:.2f} points of mAP50-95, more than --max-drop {self.config.max_drop:g}, with up to {most} in float: "
                 f"the best file is kept aside as {path}{kept}")


def _tensor_bytes(network: nn.Module) -> int:
    """What the table's first line has to say: the checkpoint's own size is that of fp16, or of an optimizer too."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def table(rows: list[Row], runtime: str, timings: Timings) -> str:
    """PyTorch, the float and the int8 file, one a line; latency of one image, median and (p90 - p10) / median."""
    lines = [f"{'':>16}  {'mAP50':>7}  {'mAP50-95':>8}  {'MiB':>7}  {'ms':>7}  {'spread':>6}  {'speed':>6}"]
    base = timings.latencies[rows[0].name]
    for name, scores, size in rows:
        latency: Latency = timings.latencies[name]
        shown = name if name == rows[0].name else f"{runtime} {name}"
        lines.append(f"{shown:>16}  {scores.map50:>7.4f}  {scores.map:>8.4f}  {size / 2**20:>7.2f}  {latency.p50_ms:>7.1f}  {latency.spread:>6.0%}  "
                     f"{base.p50_ms / latency.p50_ms:>5.2f}x")
    return "\n".join([*lines, *([timings.remark] if timings.remark else [])])
