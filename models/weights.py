"""One door for all weights: a checkpoint or an exported file, as a network ready for inference."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from models.yolo import model_from_checkpoint
from utils.checkpoint import load_checkpoint
from utils.config import DEFAULT_IMGSZ
from utils.data.spec import load_data_spec
from utils.device import PrecisionName, compute_dtype, describe, select_device
from utils.errors import UserError
from utils.export.backends import ExportedNetwork, is_exported, open_network
from utils.export.metadata import GraphNms
from utils.log import warn
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
        nms: of a file that suppresses boxes itself.
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
    nms: GraphNms | None = None

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

    def tell_limits(self, conf_thres: float, iou_thres: float, max_det: int) -> None:
        """One line where its own suppression keeps fewer boxes than asked for."""
        if self.nms and (limits := self.nms.falls_short(conf_thres, iou_thres, max_det)):
            warn(f"{self.path}: {limits}")

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
    checkpoint = load_checkpoint(weights)
    model = model_from_checkpoint(checkpoint, weights)
    network = model.fused().to(chosen, memory_format=torch.channels_last)
    imgsz = (checkpoint.imgsz, checkpoint.imgsz) if checkpoint.imgsz else None
    return OpenWeights(weights, network, model.names, model.max_stride, model.pad_stride, imgsz, None, chosen, dtype, describe(chosen, dtype))


def _open_exported(weights: str, device: str, precision: PrecisionName, data: str, data_root: str) -> OpenWeights:
    cpu = torch.device("cpu")
    if device.strip().lower() not in ("", "cpu"):
        raise UserError(f"--device {device}: {Path(weights).name} runs on the CPU: leave it out, or use the checkpoint")
    bf16 = compute_dtype(precision, cpu) == torch.bfloat16
    names = (lambda: load_data_spec(data, data_root or None).names) if data else None
    network: ExportedNetwork = open_network(weights, bf16=bf16, names=names)
    return OpenWeights(weights, network, network.names, network.max_stride, network.pad_stride, network.imgsz, network.fixed, cpu, torch.float32,
                       network.description, network.nms)
