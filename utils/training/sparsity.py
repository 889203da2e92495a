"""Training towards a network from which channels can go: network slimming and soft filter pruning."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.compress.graph import ChannelGraph, is_depthwise
from utils.compress.importance import Scores, fpgm, l2
from utils.compress.plan import Limits, best_of, uniform
from utils.compress.trace import KEPT
from utils.config import TrainConfig
from utils.errors import UserError

GAMMA_BINS = np.linspace(0, 2, 41)  # of the histogram of batch-norm scales
_NEAR_ZERO = 0.01
_TRACE = 1e-6  # more than fp16's least


class Slimming:
    """L1 on the batch-norm scales of channels that can be removed (Liu et al., ICCV 2017, equation 1).

    Args:
        strength: the paper's lambda: of one image, as the loss sums over a step's images.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, strength: float) -> None:
        parameters = dict(model.named_parameters())
        self.scales = [parameters[key] for key in graph.norms if (graph.uses[key][0] != KEPT).any()]
        self.strength = strength

    def __call__(self, images: int) -> None:
        """Add the penalty's gradient to the scales' own, which must be unscaled and of so many images."""
        for scale in self.scales:
            if scale.grad is not None:
                scale.grad.add_(scale.detach().sign(), alpha=self.strength * images)

    def histogram(self) -> list[int]:
        """How many scales have a size in each of GAMMA_BINS; the last counts the larger ones too."""
        return np.histogram(np.minimum(self._sizes(), GAMMA_BINS[-1]), GAMMA_BINS)[0].tolist()

    def sparsity(self) -> float:
        """The share of scales that are nearly zero."""
        return float((self._sizes() < _NEAR_ZERO).mean())

    def _sizes(self) -> np.ndarray:
        return torch.cat([scale.detach().abs() for scale in self.scales]).float().cpu().numpy()


class SoftPruning:
    """Zeroes the weakest filters after each epoch; the next epoch may bring them back (He et al., IJCAI 2018).

    Channels that a frozen layer makes, or whose shift or bias is frozen, are left alone: nothing would bring them back.

    Args:
        score: utils.compress.importance's `l2` (the paper's) or `fpgm`.
        ratio: share of each layer's filters.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, score: Callable[[ChannelGraph, Mapping[str, Tensor]], Scores], ratio: float) -> None:
        self.graph, self.score = graph, score
        self._zeroed = dict(_zeroed(graph))
        frozen = [graph.uses[key][self._zeroed[key]] for key, p in model.named_parameters() if key in self._zeroed and not p.requires_grad]
        left_alone = np.unique(np.concatenate([*frozen, np.zeros(0, int)]))
        self.groups = [group.name for group in graph.groups if not np.isin(group.channels, left_alone).any()]
        shares = uniform(graph, Limits(0.0, 1))(1 - ratio)
        self.plan = {group.name: shares[group.name] if group.name in self.groups else len(group.channels) for group in graph.groups}

    @torch.no_grad()
    def __call__(self, model: nn.Module, average: nn.Module) -> None:
        """Zero the filters that are weakest in `model`, there and in its averaged copy.

        In the average their channels then are exactly zero. Norms keep their scales, and what only passes a channel on (a depthwise filter) its
        weights: through them gradients find the filters again. In `model` a bias or shift is a trace above zero, as ReLU passes no gradient at zero.
        """
        weights = model.state_dict()
        keep = best_of(self.graph, self.plan, self.score(self.graph, weights))
        for tensors, shift in ((weights, _TRACE), (average.state_dict(), 0.0)):
            for key, dim in self._zeroed.items():
                gone = torch.from_numpy(np.flatnonzero(~keep[self.graph.uses[key][dim]]))
                tensors[key].index_fill_(dim, gone.to(tensors[key].device), shift if key.endswith(".bias") else 0.0)


def _zeroed(graph: ChannelGraph) -> Iterator[tuple[str, int]]:
    """Tensors that are zeroed where a channel is, and along which dimension: filters that make one, shifts and means."""
    for key, dims in graph.uses.items():
        layer = graph.by_weight.get(key)
        if dims and (key.endswith((".bias", ".running_mean")) if layer is None else not is_depthwise(layer)):
            yield key, layer.out_dim if layer else 0


class Sparsity(NamedTuple):
    """What a training does towards it."""

    slimming: Slimming | None = None
    soft_pruning: SoftPruning | None = None


def build_sparsity(config: TrainConfig, graph: ChannelGraph, model: nn.Module) -> Sparsity:
    """Of `--slim` and `--soft-prune`.

    Raises:
        UserError: this network has nothing that they work on.
    """
    slimming = Slimming(graph, model, config.slim) if config.slim else None
    if slimming and not slimming.scales:
        raise UserError("--slim: no channel of this network that can be removed passes a batch norm: leave it out")
    score = {"sfp": l2, "fpgm": fpgm}.get(config.soft_prune)
    soft_pruning = SoftPruning(graph, model, score, config.soft_ratio) if score else None
    if soft_pruning and not soft_pruning.groups:
        raise UserError("--soft-prune: no layer of this network can lose filters and is free to bring them back: leave it out, or freeze fewer rows")
    return Sparsity(slimming, soft_pruning)
