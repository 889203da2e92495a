"""One door for all weights: a checkpoint or an exported file, as a network ready for inference."""
from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from models.yolo import DetectionModel, model_from_checkpoint
from utils.checkpoint import find_checkpoint, load_checkpoint
from utils.cpu import PrecisionName
from utils.device import compute_dtype, describe, select_device
from utils.errors import UserError
from utils.evaluate.tta import Augmented
from utils.export.backends import ExportedNetwork, is_exported, needs_gpu
from utils.export.torchscript import TORCHSCRIPT_SUFFIX
from utils.export.weights import OpenNetwork, check_device, open_exported
from utils.network import TorchRunner
from utils.runner import Runner


class Trained(NamedTuple):
    """A checkpoint's network.

    Attributes:
        path: where the file was found; what is made of it is written beside it.
        model: float32, in eval mode, on the CPU.
        imgsz: side in pixels that it was trained for, if known.
        int8: it was fine-tuned for int8.
    """

    path: Path
    model: DetectionModel
    imgsz: int | None
    int8: bool


def open_checkpoint(weights: str) -> Trained:
    """The network to be changed or converted.

    Raises:
        UserError: no such file, not a whole checkpoint, or an exported file.
    """
    if is_exported(weights):
        raise UserError(f"{weights}: is exported, perhaps int8 already: name the checkpoint (.pt) that it was made from")
    path = find_checkpoint(weights)
    checkpoint = load_checkpoint(path)
    with torch.random.fork_rng(devices=()):  # building draws start values: no business of the caller's random numbers
        model = model_from_checkpoint(checkpoint, str(path))
    return Trained(path, model, checkpoint.imgsz, checkpoint.int8)


@dataclass(frozen=True)
class OpenWeights(OpenNetwork):
    """A network that takes tensors, too (`Network`, utils/network.py), as validation does.

    Attributes:
        device, dtype: where its images go, and the type of its convolutions and matrix products there.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def runner(self) -> Runner:
        by_torch = not isinstance(self.network, ExportedNetwork) or self.network.path.suffix == TORCHSCRIPT_SUFFIX
        return TorchRunner(self.network, self.device, self.dtype) if by_torch else self.network

    def augmented(self) -> OpenWeights:
        if self.fixed:
            raise UserError(f"{self.path}: --augment looks at images in three sizes, and it takes {'x'.join(map(str, self.fixed))} px only: "
                            "export it with --dynamic, or use the checkpoint")
        return dataclasses.replace(self, network=Augmented(self.network))

    def computing(self, precision: PrecisionName) -> OpenWeights:
        """In another precision; an exported file goes on as it was opened."""
        if isinstance(self.network, ExportedNetwork):
            return self
        dtype = compute_dtype(precision, self.device)
        return dataclasses.replace(self, dtype=dtype, description=describe(self.device, dtype))

    def moved(self, device: str) -> OpenWeights:
        """A copy on another device; itself where it is there already.

        Raises:
            UserError: no such device, or not one for an exported file.
        """
        if isinstance(self.network, ExportedNetwork):
            check_device(device, self.path)
            if self.network.device != "cpu" and str(select_device(device)) != self.network.device:
                raise UserError(f"--device {device}: {Path(self.path).name} is open on {self.network.device}: open it anew")
            return self
        chosen = select_device(device)
        if chosen == self.device:
            return self
        network = copy.deepcopy(self.network).to(chosen)
        return dataclasses.replace(self, network=network, device=chosen, description=describe(chosen, self.dtype))


def open_weights(
    weights: str, device: str, precision: PrecisionName, data: str = "", data_root: str = "", at_once: int | None = None
) -> OpenWeights:
    """The network of a checkpoint, or of an exported file in its own runtime.

    Args:
        device, precision: as on the command line.
        data: the data YAML that names the classes of an exported file that tells none.
        at_once: callers that will run images side by side, for which a runtime divides its threads; `images_at_once` where None.

    Raises:
        UserError: no such file, not a whole one, or not for this device.
    """
    if is_exported(weights):
        if needs_gpu(weights) and torch.cuda.is_available():
            device = str(select_device(device))
        return OpenWeights(**vars(open_exported(weights, device, precision, data, data_root, at_once)), device=torch.device("cpu"),
                           dtype=torch.float32)
    chosen = select_device(device)
    dtype = compute_dtype(precision, chosen)
    path, model, side, _ = open_checkpoint(weights)
    return ready(model, str(path), (side, side) if side else None, chosen, dtype)


def ready(model: DetectionModel, path: str, imgsz: tuple[int, int] | None, device: torch.device, dtype: torch.dtype) -> OpenWeights:
    """A network that is built already, fused and laid out for inference; `path` is what to call it."""
    with torch.random.fork_rng(devices=()):  # some of timm's draw new weights before they merge the old ones into them
        network = model.fused().to(device, memory_format=torch.channels_last)
    return OpenWeights(path, network, model.names, model.max_stride, model.pad_stride, imgsz, fixed=None, batch=None,
                       description=describe(device, dtype), nms=None, device=device, dtype=dtype)
