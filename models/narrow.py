"""Layers made narrower in place: what a spec's `widths` say of a pruned network.

A convolution or linear layer has [input channels, output channels], a norm [channels], and a module with a `narrow()` of its own, such as
ShuffleNet's split, what that takes. null leaves a number as the YAML's rows give it, so that the classes can still change.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from utils.errors import UserError

Sizes = Sequence[int | None]


def narrow(rows: nn.ModuleList, widths: Mapping[str, Sizes], origin: str) -> None:
    """Narrow a network's rows, their values drawn anew.

    Args:
        widths: by the module's name, such as "4.m.0.cv1.conv".

    Raises:
        UserError: no such layer, or numbers that it can't take; the line begins with `origin`.
    """
    for name, sizes in widths.items():
        try:
            module = rows.get_submodule(name)
        except AttributeError:
            raise UserError(f"{origin}: widths: the network has no layer {name}") from None
        try:
            _narrow(module, sizes)
        except (ValueError, TypeError) as error:
            raise UserError(f"{origin}: widths of {name}: {error}") from None


def widths_of(rows: nn.ModuleList, whole: nn.ModuleList, moves: Mapping[str, Sizes]) -> dict[str, tuple[int | None, ...]]:
    """The widths that `narrow` makes the network `whole` into `rows` with.

    Args:
        moves: where to find those of modules with a `narrow()` of their own, whose sizes don't show.
    """
    widths = {}
    for name, module in rows.named_modules():
        if hasattr(module, "narrow"):
            sizes = moves.get(name, ())
        else:
            sizes = [new if new != old else None for new, old in zip(_sizes_of(module), _sizes_of(whole.get_submodule(name)), strict=True)]
        if any(size is not None for size in sizes):
            widths[name] = tuple(sizes)
    return widths


def _sizes_of(module: nn.Module) -> tuple[int, ...]:
    """What `_narrow` takes, as it is."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.num_features,) if isinstance(module, nn.modules.batchnorm._NormBase) else ()


def _narrow(module: nn.Module, sizes: Sizes) -> None:
    if hasattr(module, "narrow"):
        module.narrow(sizes)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        _narrow_convolution(module, *_sizes(sizes, _sizes_of(module)))
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = _sizes(sizes, _sizes_of(module))
        _redraw(module, (module.out_features, module.in_features), module.out_features)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        (module.num_features,) = _sizes(sizes, _sizes_of(module))
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim():
                left = tensor.detach()[: module.num_features].clone()
                setattr(module, key, nn.Parameter(left) if isinstance(tensor, nn.Parameter) else left)
    else:
        raise ValueError(f"a {type(module).__name__} can't be narrowed")


def _narrow_convolution(conv: nn.Conv2d | nn.ConvTranspose2d, c1: int, c2: int) -> None:
    conv.groups = min(conv.groups, c1)  # a depthwise one, or one that was pruned until it is, has a group for each channel
    if c1 % conv.groups or c2 % conv.groups:
        raise ValueError(f"{c1} to {c2} channels don't divide by its {conv.groups} groups")
    conv.in_channels, conv.out_channels = c1, c2
    per_group = (c2, c1 // conv.groups) if isinstance(conv, nn.Conv2d) else (c1, c2 // conv.groups)
    _redraw(conv, (*per_group, *conv.kernel_size), c2)


def _redraw(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, shape: Sequence[int], outputs: int) -> None:
    layer.weight = nn.Parameter(torch.empty(shape, dtype=layer.weight.dtype, device=layer.weight.device))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(outputs, dtype=layer.bias.dtype, device=layer.bias.device))
    layer.reset_parameters()


def _sizes(asked: Sizes, own: Sequence[int]) -> list[int]:
    if len(asked) != len(own):
        raise ValueError(f"takes {len(own)} numbers, found {list(asked)}")
    sizes = [size if new is None else new for new, size in zip(asked, own, strict=True)]
    for size, most in zip(sizes, own, strict=True):
        if not 1 <= size <= most:
            raise ValueError(f"{size} is not between 1 and its own {most}")
    return sizes
