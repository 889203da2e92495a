"""How much each layer's rounding to 8 bits disturbs what the network finds, measured in PyTorch, one layer at a time."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.compress.rounding import WEIGHT_LEVELS, round_input, round_weight, weighted_layers
from utils.files import write_csv

_TINY = 1e-12


class Sensitivity(NamedTuple):
    layer: str
    sqnr_db: float  # of the network's output with only this layer in int8: the lower, the more it suffers


class _Ranges(NamedTuple):
    """Of a layer in float on the images."""

    low: Tensor
    high: Tensor
    mean: Tensor  # of its output by channel


@torch.inference_mode()
def layer_sensitivities(network: nn.Module, images: Tensor, levels: int = WEIGHT_LEVELS) -> list[Sensitivity]:
    """The network's layers, the most sensitive first: a forward pass each.

    A layer's input is rounded to 256 levels of its range and its weights to `levels` on each side of 0, by channel; the mean of its output is kept,
    as quantizers correct it.

    Args:
        network: fused, in eval mode; images (B, 3, H, W) in 0..1 -> raw maps.
    """
    layers = weighted_layers(network)
    ranges: dict[str, _Ranges] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(_measure_into(ranges, name)))
        reference = network(images)
    found = []
    for name in tqdm([name for name in layers if name in ranges], desc="sensitivity", leave=False, dynamic_ncols=True):
        found.append(Sensitivity(name, output_sqnr_db(reference, _with_rounded(network, layers[name], ranges[name], images, levels))))
    return sorted(found, key=lambda sensitivity: sensitivity.sqnr_db)


def output_sqnr_db(reference: Sequence[Tensor], maps: Sequence[Tensor]) -> float:
    """Signal to noise of raw maps L x (B, A, H, W, 5 + C), as the probabilities that decoding makes of them.

    Each place counts by its objectness: what moves far from any object changes no box.
    """
    signal = noise = 0.0
    for a, b in zip(reference, maps, strict=True):
        a, b = a.sigmoid(), b.sigmoid()
        weight = a[..., 4:5]
        signal += float((weight * a.square()).sum())
        noise += float((weight * (a - b).square()).sum())
    return 10 * math.log10(max(signal, _TINY) / max(noise, _TINY))


def write_sensitivities(path: Path, found: Sequence[Sensitivity], kept: Sequence[str]) -> None:
    """As a spreadsheet: layer, SQNR, and whether it stayed float."""
    write_csv(path, ("layer", "sqnr_db", "float"), ((layer, f"{sqnr_db:.3f}", int(layer in kept)) for layer, sqnr_db in found))


def _with_rounded(network: nn.Module, layer: nn.Module, ranges: _Ranges, images: Tensor, levels: int) -> Sequence[Tensor]:
    """The network's maps with this layer in int8."""
    kept = layer.weight.data
    layer.weight.data = round_weight(kept, levels, axis=1 if isinstance(layer, nn.ConvTranspose2d) else 0)
    try:
        with ExitStack() as hooks:
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, inputs: (round_input(inputs[0], ranges.low, ranges.high), *inputs[1:])))
            hooks.enter_context(layer.register_forward_hook(lambda layer, _, output: output - _channel_mean(layer, output) + ranges.mean))
            return network(images)
    finally:
        layer.weight.data = kept


def _measure_into(ranges: dict[str, _Ranges], name: str) -> Callable:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ranges[name] = _Ranges(inputs[0].amin(), inputs[0].amax(), _channel_mean(layer, output))

    return hook


def _channel_mean(layer: nn.Module, output: Tensor) -> Tensor:
    """Of (B, C, H, W), or of a linear layer's (…, C), to add to it."""
    return output.mean(tuple(range(output.ndim - 1))) if isinstance(layer, nn.Linear) else output.mean((0, 2, 3), keepdim=True)
