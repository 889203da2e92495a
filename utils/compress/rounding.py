"""A network that computes in float as int8 files of it will: the same values, and gradients that pass straight through.

Weights: 64 steps on each side of 0, by output channel; ONNX and OpenVINO files use 7 of the 8 bits (onnx_int8.py says why). What a layer reads: 256
values between the extremes that were seen on the calibration images, one of them 0. Jacob et al., Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference (CVPR 2018); the gradient is 1 within the range and 0 outside, as if nothing had been rounded: the
straight-through estimator of Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons (2013).
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
WEIGHT_LEVELS = 64
INPUT_STEPS = 255
SILU_FLOOR = -8.0  # below it SiLU is 0 but for 0.003: where what it reads is rounded too, steps down there are lost to the others
_TINY = 1e-12


class Range(NamedTuple):
    """Of all that a layer reads; tensors of one value."""

    low: Tensor
    high: Tensor


def round_weight(weight: Tensor, levels: int = WEIGHT_LEVELS, axis: int = 0) -> Tensor:
    """To whole steps of the largest value of each channel along `axis`, which lies `levels` of them from 0."""
    others = [dim for dim in range(weight.ndim) if dim != axis]
    step = weight.detach().abs().amax(others).clamp(min=_TINY) / levels
    return torch.fake_quantize_per_channel_affine(weight, step, torch.zeros_like(step), axis, -levels, levels)


def round_input(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """To 256 values from `low` to `high`, of which one is 0."""
    return torch.fake_quantize_per_tensor_affine(x.float(), *input_steps(low, high), 0, INPUT_STEPS)


def input_steps(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The step, and which of the 256 values is 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / INPUT_STEPS).clamp(min=_TINY)
    return step, (-low / step).round().int()


def rounded_weight(layer: nn.Module, levels: int = WEIGHT_LEVELS) -> Tensor:
    """A weighted layer's, by its output channels."""
    return round_weight(layer.weight, levels, axis=1 if isinstance(layer, nn.ConvTranspose2d) else 0)


def rounding_input(seen: Range) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook that rounds what its layer reads."""
    return lambda _, inputs: (round_input(inputs[0], *seen), *inputs[1:])


@torch.no_grad()
def measure_ranges(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, Range]:
    """The extremes of what each weighted layer reads, by its name; layers that don't run have none.

    Args:
        network: in eval mode.
        batches: images (B, 3, H, W) as it takes them.
    """
    ranges: dict[str, Range] = {}
    with ExitStack() as hooks:
        for name, layer in weighted_layers(network).items():
            hooks.enter_context(layer.register_forward_pre_hook(_widening(ranges, name)))
        for images in batches:
            network(images)
    return ranges


def rounded(network: Model, ranges: Mapping[str, Range]) -> Model:
    """A copy for inference that computes as int8.

    Args:
        network: fused.
        ranges: of its layers; those without stay float.
    """
    network = copy.deepcopy(network)
    layers = weighted_layers(network)
    for name, seen in ranges.items():
        layers[name].weight.data = rounded_weight(layers[name]).data
        layers[name].register_forward_pre_hook(rounding_input(seen))
    return network


def weighted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """By name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, WEIGHTED)}


def _widening(ranges: dict[str, Range], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = Range(*inputs[0].float().aminmax())
        if before := ranges.get(name):
            seen = Range(torch.minimum(before.low, seen.low), torch.maximum(before.high, seen.high))
        ranges[name] = seen

    return hook
