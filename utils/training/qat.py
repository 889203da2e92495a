"""Quantization-aware fine-tuning: a trained network goes on learning while it computes as an int8 file of it will (Jacob et al., CVPR 2018).

The network is the fused one: its norms are folded for good, as they are in the file, so that what is rounded in training is what the file rounds.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils.checkpoint import load_checkpoint
from utils.compress.calibration import CalibrationImages
from utils.compress.rounding import Range, measure_ranges, rounded_weight, rounding_input, weighted_layers
from utils.config import QuantizeConfig, TrainConfig
from utils.data.labels import Split
from utils.distributed import World
from utils.errors import UserError
from utils.log import info
from utils.training.teacher import check_classes

_EPOCHS, _HYP = 10, "hyp.qat.yaml"


def fine_tuning(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line names, and where it says nothing what suits a fine-tuning for int8.

    Raises:
        UserError: --qat has no network to start from, or another method beside it that needs batch norms or other filters.
    """
    if not given.get("weights"):
        raise UserError("--qat: fine-tunes a trained network: name its checkpoint, --weights runs/train/exp/weights/best.pt")
    if given.get("cfg"):
        raise UserError("--qat: fine-tunes the network of --weights as it is: leave out --cfg")
    for name, why in (("slim", "acts on batch norms, and --qat folds them away"), ("soft_prune", "prepares for prune.py, which comes before --qat")):
        if given.get(name):
            raise UserError(f"--{name.replace('_', '-')}: {why}: do one after the other")
    trained_at = {} if "imgsz" in given else {"imgsz": load_checkpoint(given["weights"]).imgsz or TrainConfig.imgsz}
    # bf16 has no more steps than int8: what is rounded must be seen in fp32. Anchors are part of what was trained.
    return {"epochs": _EPOCHS, "hyp": _HYP, "precision": "fp32", "noautoanchor": True, **trained_at, **given}


def to_fine_tune(model: Any, knows: Sequence[str], origin: str) -> Any:
    """The fused network of a DetectionModel that took a checkpoint's weights, as one to train.

    Args:
        knows: the checkpoint's classes.

    Raises:
        UserError: the checkpoint is of other classes.
    """
    check_classes(knows, model.names, f"--qat: {origin}", "train it on the data first")
    return model.folded()


class QuantizationAware(nn.Module):
    """Images in, the raw maps of `network` out, computed as an int8 file of it will; gradients reach the weights as if nothing had been rounded.

    Ranges of what layers read are the extremes on the images that quantize.py calibrates on, measured on the averaged network: those of the file.
    """

    def __init__(self, network: nn.Module, images: Iterable[np.ndarray]) -> None:
        """
        Args:
            network: fused; what is left of its norms stays as it is.
            images: to calibrate on, (1, 3, H, W) float in 0..1 each.
        """
        super().__init__()
        self.network, self._images = network, images
        self.ranges: dict[str, Range] = {}

    @classmethod
    def of(cls, network: nn.Module, split: Split, config: TrainConfig) -> QuantizationAware:
        """Calibrated on images of a training split.

        Raises:
            UserError: it has too few.
        """
        images = CalibrationImages.of(split, QuantizeConfig.calib, config.imgsz, QuantizeConfig.seed, config.data)
        info(f"--qat: weights by channel and what {len(weighted_layers(network))} layers read are rounded to 8 bits as in int8 files, ranges from "
             f"{len(images)} training images; batch norms are folded; {config.epochs} epochs")
        return cls(network, images)

    @classmethod
    def with_any_range(cls, network: nn.Module) -> QuantizationAware:
        """Not calibrated, but rounding as if it were: to measure what a step takes."""
        learner = cls(network, ())
        device = next(network.parameters()).device
        learner.ranges = {name: Range(*torch.tensor((-1.0, 1.0), device=device)) for name in weighted_layers(network)}
        return learner

    @property
    def head(self) -> nn.Module:
        return self.network.head

    def forward(self, images: Tensor) -> list[Tensor]:
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        layers = weighted_layers(self.network)
        weights = {f"{name}.weight": rounded_weight(layers[name]) for name in self.ranges}
        with ExitStack() as hooks:
            for name, seen in self.ranges.items():
                hooks.enter_context(layers[name].register_forward_pre_hook(rounding_input(seen)))
            return functional_call(self.network, weights, (images,))

    def calibrate(self, average: nn.Module, world: World) -> None:
        """Take the ranges of the averaged network, which are a function of its weights alone: a resumed run has the same."""
        found = self.measure(average) if world.rank == 0 else {}
        device = next(average.parameters()).device
        plain = world.share({name: (float(seen.low), float(seen.high)) for name, seen in found.items()})
        self.ranges = {name: Range(*torch.tensor(seen, device=device)) for name, seen in plain.items()}

    def measure(self, network: nn.Module) -> dict[str, Range]:
        """Of a network in eval mode, on its device."""
        return measure_ranges(network, self._batches(next(network.parameters()).device))

    def _batches(self, device: torch.device) -> Iterator[Tensor]:
        for image in self._images:
            yield torch.from_numpy(image).to(device, memory_format=torch.channels_last)
