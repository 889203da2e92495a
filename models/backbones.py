"""Backbones of other libraries: a row that makes several levels, and the row that picks one of them.

    - [-1, 1, Timm, [mobilenetv4_conv_small, {out: [2, 3, 4]}]]  # 0
    - [0, 1, Level, [0]]  # 1 P3/8

Level i has stride 2 ** (i + 1) in both libraries: `out: [2, 3, 4]` is P3, P4 and P5 of every backbone. Channels are found by themselves.
A backbone keeps its own norms and activations, and is given images as its ImageNet recipe gives them: less the mean, over the deviation.
`pretrained: true` fetches its ImageNet weights and `pretrained: file.safetensors` reads them from disk when a training begins from the YAML; a
checkpoint brings its own.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.registry import Scale, Wiring, register
from utils.errors import UserError, first_line, short_reason
from utils.files import ROOT, find_file
from utils.log import info

LEVELS = range(6)  # strides 2 to 64


def from_image(inputs: Sequence[Any], args: list[Any], scale: Scale) -> Wiring:
    if list(inputs) != [3]:
        raise ValueError("takes the image itself: make it the first row, once, with 'from' -1")
    return Wiring(args, None)


def _one_level(inputs: Sequence[Any], args: list[Any], scale: Scale) -> Wiring:
    if len(inputs) != 1 or not isinstance(inputs[0], tuple):
        raise ValueError("picks a level of one row that makes several, such as Timm or Torchvision")
    last = len(inputs[0]) - 1
    if len(args) != 1 or type(args[0]) is not int or not 0 <= args[0] <= last:
        raise ValueError(f"needs the number of one of the {last + 1} levels that its row gives, 0 to {last}")
    return Wiring(args, inputs[0][args[0]])


@register("Level", channels=_one_level, takes_levels=True)
class Level(nn.Module):
    """One map of a row that makes several."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return levels[self.index]


class Map(NamedTuple):
    """Where a network makes a level."""

    place: Any
    channels: int
    channels_last: bool


class Backbone(nn.Module):
    """Another library's network down to the last level asked for: images (B, 3, H, W) in 0..1 -> (B, C, H/s, W/s) for each level of `out`.

    Attributes:
        out_channels: C of each level.
    """

    net: nn.Module
    out_channels: tuple[int, ...]

    def __init__(self, name: str, out: Sequence[int], pretrained: bool | str) -> None:
        super().__init__()
        if not isinstance(out, list | tuple) or not out or list(out) != sorted({i for i in out if i in LEVELS}):
            raise UserError(f"out: {out} must be rising level numbers from 0 to {LEVELS[-1]}, such as [2, 3, 4]; level i has stride 2 ** (i + 1)")
        if not isinstance(pretrained, bool | str):
            raise UserError(f"pretrained: {pretrained} must be true, false or a file of weights")
        self.name, self.out, self.pretrained = name, tuple(out), pretrained

    def _choose(self, levels: Mapping[int, Map]) -> list[Map]:
        if missing := [i for i in self.out if i not in levels]:
            known = ", ".join(f"{i} (stride {2 ** (i + 1)})" for i in LEVELS if i in levels) or "none, its maps having no whole strides"
            raise UserError(f"{self.name} has no level {missing[0]} (stride {2 ** (missing[0] + 1)}); its levels are {known}")
        maps = [levels[i] for i in self.out]
        self.out_channels = tuple(m.channels for m in maps)
        self._channels_last = tuple(m.channels_last for m in maps)
        return maps

    def _normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.net((images - self.mean) / self.std)
        maps = maps.values() if isinstance(maps, dict) else maps
        return tuple(x.permute(0, 3, 1, 2) if last else x for x, last in zip(maps, self._channels_last, strict=True))

    def load_pretrained(self) -> None:
        """Take the weights that the row's `pretrained` names, if any.

        Raises:
            UserError: they can't be fetched, or the file is not of this network.
        """
        if not self.pretrained:
            return
        path = None if self.pretrained is True else find_file(self.pretrained, [ROOT], "weights file")
        weights = self._read(path) if path else self._fetch()
        try:
            self.net.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{path or 'the weights that were fetched'}: not those of this {self.name}: {short_reason(error)}") from error
        info(f"{self.name}: pretrained weights {f'read from {path}' if path else 'fetched'}")

    def _fetch(self) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def _read(self, path: Path) -> Mapping[str, Tensor]:
        raise NotImplementedError


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict that torch.save wrote.

    Raises:
        UserError: neither, or damaged.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"{path}: needs safetensors: pip install safetensors") from None
    except Exception as error:  # of whatever the file holds
        raise UserError(f"{path}: can't be read as weights: {first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: is no state dict, whose keys name tensors; save one by torch.save(model.state_dict(), …)")
    return weights


def check_weights(path: Path, name: str, weights: Mapping[str, Tensor], needed: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    """Every tensor needed is there in its shape, and nothing that the network does not know."""
    missing = [key for key in needed if key not in weights and not key.endswith("num_batches_tracked")]  # which older files have not
    other = [f"{key} {tuple(weights[key].shape)}, not {tuple(value.shape)}" for key, value in needed.items()
             if key in weights and weights[key].shape != value.shape]
    unknown = [key for key in weights if key not in known]
    faults = {"missing": missing, "of another shape": other, "unknown": unknown}
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault}, first {keys[0]}" for fault, keys in faults.items() if keys)
        raise UserError(f"{path}: its tensors are not those of {name}: {listed}")
