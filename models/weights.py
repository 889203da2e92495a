"""One door for all weights: a checkpoint or an exported file, as a network ready for inference."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from models.yolo import DetectionModel, model_from_checkpoint
from utils.checkpoint import find_checkpoint, load_checkpoint
from utils.config import DEFAULT_IMGSZ
from utils.data.spec import load_data_spec
from utils.device import PrecisionName, compute_dtype, describe, select_device
from utils.errors import UserError
from utils.export.backends import ExportedNetwork, is_exported, open_network
from utils.network import Network


class Trained(NamedTuple):
    """A checkpoint's network.

    Attributes:
        path: where the file was found; what is made of it is written beside it.
        model: float32, in eval mode, on the CPU.
        imgsz: side in pixels that it was trained for, if known.
    """

    path: Path
    model: DetectionModel
    imgsz: int | None


def open_checkpoint(weights: str) -> Trained:
    """The network to be changed or converted.

    Raises:
        UserError: no such file, not a whole checkpoint, or an exported file.
    """
    if is_exported(weights):
        raise UserError(f"{weights}: is exported, perhaps int8 already: name the checkpoint (.pt) that it was made from")
    path = find_checkpoint(weights)
    checkpoint = load_checkpoint(path)
    return Trained(path, model_from_checkpoint(checkpoint, str(path)), checkpoint.imgsz)


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
        if self.fixed == (height, width):  # of another project's file not always in whole strides
            return self.fixed
        size = tuple(math.ceil(side / self.max_stride) * self.max_stride for side in (height, width))
        if self.fixed and size != self.fixed:
            own, wanted = (" ".join(map(str, sides)) for sides in (self.fixed, size))
            raise UserError(f"{self.path}: takes images of {own} px only: leave out --imgsz, or export it with --imgsz {wanted} or --dynamic")
        return size

    def square_size(self, asked: int | None) -> int:
        """`image_size` for those who scale each image's longer side to one number: the longer side of what it was made for.

        Raises:
            UserError: likewise, or it takes no square images.
        """
        if self.fixed and self.fixed[0] != self.fixed[1]:
            raise UserError(f"{self.path}: takes images of {self.fixed[0]}x{self.fixed[1]} px only, and validation needs square ones: "
                            f"export it with --imgsz {max(self.fixed)} or --dynamic")
        return self.image_size((asked or max(self.imgsz or (DEFAULT_IMGSZ,)),))[0]


def open_weights(weights: str, device: str, precision: PrecisionName, data: str = "", data_root: str = "") -> OpenWeights:
    """The network of a checkpoint, or of an exported file in its own runtime.

    Args:
        device, precision: as on the command line.
        data: the data YAML that names the classes of an exported file that tells none.

    Raises:
        UserError: no such file, not a whole one, or not for this device.
    """
    if is_exported(weights):
        return _open_exported(weights, device, precision, data, data_root)
    chosen = select_device(device)
    dtype = compute_dtype(precision, chosen)
    path, model, imgsz = open_checkpoint(weights)
    network = model.fused().to(chosen, memory_format=torch.channels_last)
    return OpenWeights(
        path=str(path), network=network, names=model.names, max_stride=model.max_stride, pad_stride=model.pad_stride,
        imgsz=(imgsz, imgsz) if imgsz else None, fixed=None, device=chosen, dtype=dtype, description=describe(chosen, dtype),
    )


def _open_exported(weights: str, device: str, precision: PrecisionName, data: str, data_root: str) -> OpenWeights:
    cpu = torch.device("cpu")
    if device.strip().lower() not in ("", "cpu"):
        raise UserError(f"--device {device}: {Path(weights).name} runs on the CPU: leave it out, or use the checkpoint")
    bf16 = compute_dtype(precision, cpu) == torch.bfloat16
    names = (lambda: load_data_spec(data, data_root or None).names) if data else None
    network: ExportedNetwork = open_network(weights, bf16=bf16, names=names)
    return OpenWeights(
        path=weights, network=network, names=network.names, max_stride=network.max_stride, pad_stride=network.pad_stride,
        imgsz=network.imgsz, fixed=network.fixed, device=cpu, dtype=torch.float32, description=network.description,
    )
