"""Any convolutional classifier of torchvision, and its Swin, as a row."""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.backbones import LEVELS, Backbone, Map, check_weights, from_image, read_weights
from models.registry import register
from utils.errors import UserError, first_line
from utils.extras import import_extra
from utils.files import did_you_mean

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_PROBE = (256, 192)  # height and width; their ratio tells maps from channels-last maps


@register("Torchvision", channels=from_image, foreign=True)
class Torchvision(Backbone):
    """A classifier of torchvision: level i is the output of its last block of stride 2 ** (i + 1)."""

    def __init__(self, name: str, out: Sequence[int] = (2, 3, 4), pretrained: bool | str = False) -> None:
        super().__init__(name, out, pretrained)
        models = _models()
        names = models.list_models(models)
        if name not in names:
            raise UserError(f"torchvision has no classifier {name}{did_you_mean(name, names)}")
        self._weights = getattr(models.get_model_weights(name), "DEFAULT", None)
        try:
            with torch.device("meta"):
                levels = _levels(_classifier(name))
            places = [m.place for m in self._choose(levels)]
            both = import_extra("torchvision.models.feature_extraction").create_feature_extractor(
                _classifier(name), places, suppress_diff_warning=True)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"torchvision's {name} can't be cut into levels ({first_line(error)}); does timm have it?") from error
        # One graph for training and evaluation, which differ in leaf modules only: a copy of torchvision's pair of graphs falls into training mode
        self.net = fx.GraphModule(both, both.train_graph, type(both).__name__)
        recipe = self._weights and self._weights.transforms()
        # What these do to their images themselves when they are made with weights
        halves = name in ("googlenet", "inception_v3")
        self._normalise_by(*(_HALVES if halves else (recipe.mean, recipe.std) if recipe else _IMAGENET))

    def _fetch(self) -> Mapping[str, Tensor]:
        if not self._weights:
            raise UserError(f"torchvision has no weights for {self.name}")
        try:
            return self._part(_renamed(self._weights.get_state_dict(progress=True, check_hash=True)))
        except Exception as error:  # of the network or the disk
            raise UserError(f"the weights of torchvision's {self.name} can't be fetched ({first_line(error)}); where there is a network download "
                            f"{self._weights.url} and give the file as pretrained: {self._weights.url.rpartition('/')[2]}") from error

    def _read(self, path: Path) -> Mapping[str, Tensor]:
        with torch.device("meta"):
            known = _classifier(self.name).state_dict()
        weights = _renamed(read_weights(path))
        check_weights(path, self.name, weights, self.net.state_dict(), known)
        return self._part(weights)

    def _part(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of a whole classifier's tensors that its levels need."""
        own = self.net.state_dict()
        return {key: value for key, value in weights.items() if key in own}


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DenseNet's files are older than its names: denselayer1.norm.1.weight is denselayer1.norm1.weight now."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", key): value for key, value in weights.items()}


def _models() -> ModuleType:
    """Only for those who name one of them: importing them takes as long as importing torch."""
    return import_extra("torchvision").models


def _classifier(name: str) -> nn.Module:
    try:
        return _models().get_model(name, weights=None)
    except NotImplementedError:  # RegNets read numbers off tensors as they are built, which the meta device can't
        with torch.device("cpu"):
            return _models().get_model(name, weights=None).to("meta")


def _levels(net: nn.Module) -> dict[int, Map]:
    """The last block's output at each stride, found by running an image of `_PROBE` through a network without memory."""
    found: dict[int, Map] = {}

    def watch(place: str, output: Any) -> None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        for level in LEVELS:
            sides = tuple(side >> level + 1 for side in _PROBE)
            if len(shape) == 4 and sides in (shape[2:], shape[1:3]):
                found[level] = Map(place, shape[1] if shape[2:] == sides else shape[3], shape[2:] != sides)

    for place, block in _blocks(net):
        block.register_forward_hook(lambda _, inputs, output, place=place: watch(place, output))
    net.eval()(torch.zeros(1, 3, *_PROBE))
    return found


def _blocks(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in net.named_children():
        if name == "classifier":
            continue
        if isinstance(child, nn.Sequential):
            yield from ((f"{name}.{n}", block) for n, block in child.named_children())
        else:
            yield name, child
