"""An opened network with what those who feed it need to know, and the door for exported files, which needs no PyTorch."""
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import DEFAULT_IMGSZ
from utils.cpu import PrecisionName, check_precision, cpu_precision
from utils.data.spec import load_data_spec
from utils.errors import UserError
from utils.export.backends import is_exported, needs_gpu, open_network
from utils.export.metadata import GraphNms
from utils.files import ROOT, find_file
from utils.log import warn
from utils.nms import NmsOptions
from utils.runner import Runner

_NEEDS_TORCH = "pip install torch torchvision"


@dataclass(frozen=True)
class OpenNetwork:
    """A network in place with what those who feed it need to know.

    Attributes:
        network: ready for inference.
        names: of its classes.
        max_stride: image sides are multiples of it, pixels.
        pad_stride: images are padded to multiples of it; None: to the whole of `fixed`.
        imgsz: (height, width) that it was made for, where it says so.
        fixed: (height, width) where it takes no other images.
        batch: number of images where it takes no other.
        description: device or runtime, threads and precision.
        nms: of a file that suppresses boxes itself.
    """

    path: str
    network: Any
    names: tuple[str, ...]
    max_stride: int
    pad_stride: int | None
    imgsz: tuple[int, int] | None
    fixed: tuple[int, int] | None
    batch: int | None
    description: str
    nms: GraphNms | None

    @property
    def runner(self) -> Runner:
        """It, as detection wants it."""
        return self.network

    def augmented(self) -> OpenNetwork:
        """It with test-time augmentation.

        Raises:
            UserError: it was opened without PyTorch, which joins the looks.
        """
        raise UserError(f"augment: needs PyTorch ({_NEEDS_TORCH})")

    def image_size(self, asked: Sequence[int] | None) -> tuple[int, int]:
        """(height, width) in whole strides: as asked, with one number for both; else as it was made for; else the usual one.

        Raises:
            UserError: it takes no other than its own.
        """
        height, width = (asked[0], asked[-1]) if asked else self.fixed or self.imgsz or (DEFAULT_IMGSZ, DEFAULT_IMGSZ)
        if (height, width) == self.fixed:  # of another project's file perhaps no whole strides
            return self.fixed
        size = tuple(math.ceil(side / self.max_stride) * self.max_stride for side in (height, width))
        if self.fixed and size != self.fixed:
            raise UserError(f"{self.path}: takes images of {'x'.join(map(str, self.fixed))} px only: leave out --imgsz, or export it with "
                            f"--imgsz {' '.join(map(str, size))} or --dynamic")
        return size

    def tell_limits(self, options: NmsOptions) -> None:
        """One line where its own suppression keeps other boxes than asked for."""
        across = options.agnostic and len(self.names) > 1
        if self.nms and (limits := self.nms.falls_short(dataclasses.replace(options, agnostic=across))):
            _warn_once(f"{self.path}: {limits}")

    def tell_waste(self) -> None:
        """One line for those who give it one image at a time, where it computes a whole batch for each."""
        if self.batch and self.batch > 1:
            _warn_once(f"{self.path}: takes {self.batch} images at once, so that each one alone costs as much: export it without --batch-size")

    def val_size(self, asked: int | None) -> int | tuple[int, int]:
        """`image_size` for validation, which scales each image's longer side to one number, the longer side of what the network was made for; of a
        file that takes no squares (height, width).

        Raises:
            UserError: likewise.
        """
        if self.fixed and self.fixed[0] != self.fixed[1]:
            return self.image_size((asked,) if asked else None)
        return self.image_size((asked or max(self.imgsz or (DEFAULT_IMGSZ,)),))[0]


@functools.cache
def _warn_once(line: str) -> None:
    """Not again for each frame of a video."""
    warn(line)


def open_exported(
    weights: str, device: str, precision: PrecisionName, data: str = "", data_root: str = "", at_once: int | None = None
) -> OpenNetwork:
    """The network of an exported file in its own runtime.

    Args:
        device, precision: as on the command line; of an engine the device as PyTorch names it.
        data: the data YAML that names the classes of a file that tells none.
        at_once: callers that will run images side by side, for which the runtime divides its threads; `images_at_once` where None.

    Raises:
        UserError: no such file, not an exported or not a whole one, or not for this device.
    """
    if not is_exported(weights):
        find_file(weights, [ROOT], "weights file")
        raise UserError(f"{weights}: is no exported file, and a checkpoint needs PyTorch ({_NEEDS_TORCH}); export.py makes files of it that run "
                        "without")
    check_device(device, weights)
    names = (lambda: load_data_spec(data, data_root or None).names) if data else None
    check_precision(precision)
    bf16 = not needs_gpu(weights) and cpu_precision(precision) == "bf16"  # an engine computes in what it was built for
    network = open_network(weights, bf16=bf16, names=names, at_once=at_once, device=device)
    return OpenNetwork(weights, network, network.names, network.max_stride, network.pad_stride, network.imgsz, network.fixed, network.batch,
                       network.description, network.nms)


def check_device(device: str, weights: str) -> None:
    """Raises UserError where an exported file is asked to run on another kind of device than it can."""
    if device.strip().lower() not in ("", "cpu") and not needs_gpu(weights):
        raise UserError(f"--device {device}: {Path(weights).name} runs on the CPU: leave it out, or use the checkpoint")
