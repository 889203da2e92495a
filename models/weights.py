"""One door for all weights: a checkpoint or an exported file, as a network ready for inference."""
from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from models.yolo import DetectionModel, model_from_checkpoint
from utils.checkpoint import load_checkpoint
from utils.config import DEFAULT_IMGSZ
from utils.data.spec import load_data_spec
from utils.device import PrecisionName, compute_dtype, describe, select_device
from utils.errors import UserError
from utils.export.backends import ExportedNetwork, is_exported, open_network
from utils.network import Network


class OpenWeights(NamedTuple):
    """A network with what those who feed it need to know.

    Attributes:
        names: of its classes.
        max_stride: image sides are multiples of it, pixels.
        pad_stride: images are padded to multiples of it; None: to the whole of `fixed`.
        imgsz: (height, width) that it was made for, where it says so.
        fixed: (height, width) where it takes no other images.
        device, dtype: where its images go, and the type of its convolutions and matrix products there.
        description: device or runtime, threads and precision.
    """

    path: str
    network: Network
    names: tuple[str, ...]
    max_stride: int
    pad_stride: int | None
    imgsz: tuple[int, int] | None
    fixed: tuple[int, int] | None
    device: torch.device
    dtype: torch.dtype
    description: str

    def image_size(self, asked: Sequence[int] | None) -> tuple[int, int]:
        """(height, width) in whole strides: as asked, with one number for both; else as it was made for; else the usual one.

        Raises:
            UserError: it takes no other than its own.
        """
        height, width = (asked[0], asked[-1]) if asked else self.imgsz or (DEFAULT_IMGSZ, DEFAULT_IMGSZ)
        size = tuple(math.ceil(side / self.max_stride) * self.max_stride for side in (height, width))
        if self.fixed and size != self.fixed:
            own, wanted = (" ".join(map(str, sides)) for sides in (self.fixed, size))
            raise UserError(f"{self.path}: takes images of {own} px only: leave out --imgsz, or export it with --imgsz {wanted} or --dynamic")
        return self.fixed or size

    def square_size(self, asked: int | None) -> int:
        """`image_size` for those who scale each image's longer side to one number: the longer side of what it was made for.

        Raises:
            UserError: likewise, or it takes no square images.
        """
        if self.fixed and self.fixed[0] != self.fixed[1]:
            raise UserError(f"{self.path}: takes images of {self.fixed[0]}x{self.fixed[1]} px only, and validation needs square ones: "
                            f"export it with --imgsz {max(self.fixed)} or --dynamic")
        return self.image_size((asked or max(self.imgsz or (DEFAULT_IMGSZ,)),))[0]

    def computing(self, precision: PrecisionName) -> OpenWeights:
        """In another precision; an exported file goes on as it was opened."""
        if isinstance(self.network, ExportedNetwork):
            return self
        dtype = compute_dtype(precision, self.device)
        return self._replace(dtype=dtype, description=describe(self.device, dtype))

    def moved(self, device: str) -> OpenWeights:
        """A copy on another device; itself where it is there already.

        Raises:
            UserError: no such device, or not one for an exported file.
        """
        if isinstance(self.network, ExportedNetwork):
            _check_cpu(device, self.path)
            return self
        chosen = select_device(device)
        if chosen == self.device:
            return self
        network = copy.deepcopy(self.network).to(chosen)
        return self._replace(network=network, device=chosen, description=describe(chosen, self.dtype))


def open_weights(
    weights: str, device: str, precision: PrecisionName, data: str = "", data_root: str = "", at_once: int | None = None
) -> OpenWeights:
    """The network of a checkpoint, or of an exported file in its own runtime.

    Args:
        device, precision: as on the command line.
        data: the data YAML that names the classes of an exported file that tells none.
        at_once: callers that will run images side by side, for which a runtime divides its threads; as many as `inference_threads` starts where None.

    Raises:
        UserError: no such file, not a whole one, or not for this device.
    """
    if is_exported(weights):
        return _open_exported(weights, device, precision, data, data_root, at_once)
    chosen = select_device(device)
    dtype = compute_dtype(precision, chosen)
    checkpoint = load_checkpoint(weights)
    with torch.random.fork_rng(devices=()):  # building draws start values: no business of the caller's random numbers
        model = model_from_checkpoint(checkpoint, weights)
    imgsz = (checkpoint.imgsz, checkpoint.imgsz) if checkpoint.imgsz else None
    return ready(model, weights, imgsz, chosen, dtype)


def ready(model: DetectionModel, path: str, imgsz: tuple[int, int] | None, device: torch.device, dtype: torch.dtype) -> OpenWeights:
    """A network that is built already, fused and laid out for inference; `path` is what to call it."""
    network = model.fused().to(device, memory_format=torch.channels_last)
    return OpenWeights(path, network, model.names, model.max_stride, model.pad_stride, imgsz, None, device, dtype, describe(device, dtype))


def _open_exported(weights: str, device: str, precision: PrecisionName, data: str, data_root: str, at_once: int | None) -> OpenWeights:
    _check_cpu(device, weights)
    cpu = torch.device("cpu")
    bf16 = compute_dtype(precision, cpu) == torch.bfloat16
    names = (lambda: load_data_spec(data, data_root or None).names) if data else None
    network: ExportedNetwork = open_network(weights, bf16=bf16, names=names, at_once=at_once)
    return OpenWeights(weights, network, network.names, network.max_stride, network.pad_stride, network.imgsz, network.fixed, cpu, torch.float32,
                       network.description)


def _check_cpu(device: str, weights: str) -> None:
    if device.strip().lower() not in ("", "cpu"):
        raise UserError(f"--device {device}: {Path(weights).name} runs on the CPU: leave it out, or use the checkpoint")
