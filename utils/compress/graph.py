"""A network's removable channels: groups of them to choose among, what any choice costs, and the network that is left of it."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.compress.trace import KEPT, Layer, Trace


class Group(NamedTuple):
    """Channels that compete with each other: those of one layer, or of several whose outputs are summed."""

    name: str  # of its first layer
    layers: tuple[str, ...]  # keys of the weights that make them
    channels: np.ndarray  # (n,) numbers, in the order of the first layer's outputs


class ChannelGraph:
    """What can be removed of a network. A choice is `keep`: (channels,) bool by number; number 0 stands for all that stays.

    Attributes:
        groups: every removable channel is in one of them.
        kept_whole: module -> the operation in it that can't do with fewer channels.
        whole: key of the weights of a layer that keeps all its outputs -> how many these are.
        norms: keys of the scales of norms.
    """

    def __init__(self, trace: Trace, shapes: Mapping[str, Sequence[int]], macs: int = 0) -> None:
        """
        Args:
            macs: multiply-accumulates for the traced image. What of them is no layer's, such as products of attention, stays with any choice.
        """
        self.uses, self.moves, self.layers, self.each, self.kept_whole = trace.uses, trace.moves, trace.layers, trace.each, trace.kept_whole
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self.count = 1 + max((int(dim.max()) for dims in self.uses.values() for dim in dims if dim is not None and len(dim)), default=0)
        self.groups = tuple(_groups(self.layers))
        self.by_weight = {layer.weight: layer for layer in self.layers}
        # Weights of one dimension that are no layer's belong to norms.
        self.norms = [key for key, dims in self.uses.items() if key.endswith(".weight") and len(dims) == 1]
        self.everything = np.ones(self.count, bool)
        self._other_macs = max(macs - self._layers_macs(self.everything), 0)
        # Key of the weights -> its outputs, of layers that lose none: an output, something that needs every channel, or a layer of an unknown kind.
        self.whole = {layer.weight: len(layer.outputs) for layer in self.layers if (layer.outputs == KEPT).all()}
        self.whole |= {key: shape[0] for key, shape in self.shapes.items()
                       if len(shape) > 1 and key.endswith("weight") and key not in self.by_weight}

    def keep(self, chosen: Mapping[str, np.ndarray]) -> np.ndarray:
        """A choice from what each group keeps: name -> (n,) bool; groups that are not named keep all."""
        keep = self.everything.copy()
        for group in self.groups:
            if group.name in chosen:
                keep[group.channels] = chosen[group.name]
        keep[KEPT] = True
        return keep

    def macs(self, keep: np.ndarray) -> int:
        """Multiply-accumulates for the traced image."""
        return self._layers_macs(keep) + self._other_macs

    def _layers_macs(self, keep: np.ndarray) -> int:
        """Of convolutions, linear layers and norms."""
        total = sum(int(keep[channels].sum()) * work for channels, work in self.each)
        for layer in self.layers:
            c1, c2 = int(keep[layer.inputs].sum()), int(keep[layer.outputs].sum())
            total += c2 * layer.work * (1 if is_depthwise(layer) else c1 // layer.groups)
        return total

    def parameters(self, keep: np.ndarray, trained: Sequence[str]) -> int:
        """Of the tensors `trained`."""
        return sum(int(np.prod(self._shape(key, keep), dtype=np.int64)) for key in trained)

    def _shape(self, key: str, keep: np.ndarray) -> list[int]:
        dims = self.uses.get(key, ())
        return [int(keep[numbers].sum()) if numbers is not None else size
                for size, numbers in zip(self.shapes[key], (*dims, *[None] * (len(self.shapes[key]) - len(dims))), strict=True)]

    def cut(self, weights: Mapping[str, Tensor], keep: np.ndarray) -> dict[str, Tensor]:
        """The tensors of the network that is left."""
        left = {}
        for key, tensor in weights.items():
            for dim, numbers in enumerate(self.uses.get(key, ())):
                if numbers is not None and not keep[numbers].all():
                    tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(keep[numbers])).to(tensor.device))
            left[key] = tensor
        return left

    def widths(self, model: nn.Module, keep: np.ndarray, before: Mapping[str, Sequence[int | None]]) -> dict[str, tuple[int | None, ...]]:
        """What a spec says of the network that is left: layer -> its channels, see models/narrow.py.

        Args:
            model: the traced one.
            before: its own widths, as it may have lost channels already.
        """
        widths = {name: tuple(sizes) for name, sizes in before.items()}
        of_layers = {layer.weight.rpartition(".")[0]: (layer.inputs, layer.outputs) for layer in self.layers}
        of_norms = {key.rpartition(".")[0]: (dims[0],) for key, dims in self.uses.items() if key.rpartition(".")[0] not in of_layers}
        for name, channels in (of_layers | of_norms).items():
            old = widths.get(name, (None,) * len(channels))
            new = tuple(size if keep[numbers].all() else int(keep[numbers].sum()) for size, numbers in zip(old, channels, strict=True))
            if any(size is not None for size in new):
                widths[name] = new
        for name, inputs in self.moves.items():
            kept = [keep[numbers] for numbers in inputs]
            if not all(mask.all() for mask in kept):
                widths[name] = tuple(model.get_submodule(name).narrowed(kept))
        return widths


def is_depthwise(layer: Layer) -> bool:
    return layer.groups > 1 and layer.groups == len(layer.inputs)


def _groups(layers: Sequence[Layer]) -> list[Group]:
    """Layers that share a channel are one group; depthwise ones make none."""
    group_of: dict[int, int] = {}  # channel -> the first layer of its group
    members: dict[int, list[int]] = {}
    for n, layer in enumerate(layers):
        made = [] if is_depthwise(layer) else [c for c in dict.fromkeys(layer.outputs.tolist()) if c != KEPT]
        if not made:
            continue
        merged = sorted({group_of[c] for c in made if c in group_of})
        first, own = (merged[0], members[merged[0]]) if merged else (n, members.setdefault(n, []))
        for other in merged[1:]:
            own += members.pop(other)
        own.append(n)
        group_of |= dict.fromkeys(made, first) | {c: first for c, group in group_of.items() if group in merged}
    groups = []
    for first, own in members.items():
        channels = [c for c, group in group_of.items() if group == first]
        groups.append(Group(layers[first].weight, tuple(layers[n].weight for n in sorted(own)), np.array(channels)))
    return groups
