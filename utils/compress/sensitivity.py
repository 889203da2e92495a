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

from utils.compress.rounding import WEIGHT_LEVELS, Range, measure_ranges, rounded_weight, rounding_input, weighted_layers
from utils.files import write_csv

_TINY = 1e-12


class Sensitivity(NamedTuple):
    layer: str
    sqnr_db: float  # of the network's output with only this layer in int8: the lower, the more it suffers


@torch.inference_mode()
def layer_sensitivities(network: nn.Module, images: Tensor, levels: int = WEIGHT_LEVELS) -> list[Sensitivity]:
    """The network's layers, the most sensitive first: a forward pass each.

    A layer's input is rounded to 256 levels of its range and its weights to `levels` on each side of 0, by channel; the mean of its output is kept,
    as quantizers correct it.

    Args:
        network: fused, in eval mode; images (B, 3, H, W) in 0..1 -> raw maps.
    """
    layers = weighted_layers(network)
    ranges, means = measure_ranges(network, [images]), {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(_mean_into(means, name)))
        reference = network(images)
    found = []
    for name in tqdm([name for name in layers if name in ranges], desc="sensitivity", leave=False, dynamic_ncols=True):
        maps = _with_rounded(network, layers[name], ranges[name], means[name], images, levels)
        found.append(Sensitivity(name, output_sqnr_db(reference, maps)))
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


def _with_rounded(network: nn.Module, layer: nn.Module, seen: Range, mean: Tensor, images: Tensor, levels: int) -> Sequence[Tensor]:
    """The network's maps with this layer in int8, the mean of its output by channel as it was."""
    kept = layer.weight.data
    layer.weight.data = rounded_weight(layer, levels)
    try:
        with ExitStack() as hooks:
            hooks.enter_context(layer.register_forward_pre_hook(rounding_input(seen)))
            hooks.enter_context(layer.register_forward_hook(lambda layer, _, output: output - _channel_mean(layer, output) + mean))
            return network(images)
    finally:
        layer.weight.data = kept


def _mean_into(means: dict[str, Tensor], name: str) -> Callable:
    def hook(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        means[name] = _channel_mean(layer, output)

    return hook


def _channel_mean(layer: nn.Module, output: Tensor) -> Tensor:
    """Of (B, C, H, W), or of a linear layer's (…, C), to add to it."""
    return output.mean(tuple(range(output.ndim - 1))) if isinstance(layer, nn.Linear) else output.mean((0, 2, 3), keepdim=True)
