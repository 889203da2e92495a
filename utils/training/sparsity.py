"""Training towards a network from which channels can go: network slimming and soft filter pruning."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.compress.graph import ChannelGraph
from utils.compress.importance import Scores, fpgm, l2
from utils.compress.plan import Limits, best_of, uniform
from utils.compress.trace import KEPT
from utils.config import TrainConfig
from utils.training.schedule import accumulation

GAMMA_BINS = np.linspace(0, 2, 41)  # of the histogram of batch-norm scales
_NEAR_ZERO = 0.01


class Slimming:
    """L1 on the batch-norm scales of channels that can be removed (Liu et al., ICCV 2017, equation 1).

    Args:
        strength: the paper's lambda times the images that a step's loss sums over.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, strength: float) -> None:
        parameters = dict(model.named_parameters())
        self.scales = [parameters[key] for key in graph.norms if (graph.uses[key][0] != KEPT).any()]
        self.strength = strength

    def __call__(self) -> None:
        """Add the penalty's gradient to the scales' own, which must be unscaled."""
        for scale in self.scales:
            if scale.grad is not None:
                scale.grad.add_(scale.detach().sign(), alpha=self.strength)

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

    Args:
        score: utils.compress.importance's `l2` (the paper's) or `fpgm`.
        ratio: share of each layer's filters.
    """

    def __init__(self, graph: ChannelGraph, score: Callable[[ChannelGraph, Mapping[str, Tensor]], Scores], ratio: float) -> None:
        self.graph, self.score = graph, score
        self.plan = uniform(graph, Limits(0.0, 1))(1 - ratio)

    @torch.no_grad()
    def __call__(self, model: nn.Module, average: nn.Module) -> None:
        """Zero the filters that are weakest in `model`, there and in its averaged copy.

        Their channels then are exactly zero. Norms keep their scales: through them gradients find the filters again.
        """
        weights = model.state_dict()
        keep = best_of(self.graph, self.plan, self.score(self.graph, weights))
        for tensors in (weights, average.state_dict()):
            for key, dims in self.graph.uses.items():
                layer = self.graph.by_weight.get(key)
                if layer is None and not key.endswith((".bias", ".running_mean")):
                    continue
                dim = layer.out_dim if layer and dims[layer.out_dim] is not None else 0
                tensors[key].index_fill_(dim, torch.from_numpy(np.flatnonzero(~keep[dims[dim]])).to(tensors[key].device), 0)


class Sparsity(NamedTuple):
    """What a training does towards it."""

    slimming: Slimming | None = None
    soft_pruning: SoftPruning | None = None


def build_sparsity(config: TrainConfig, graph: ChannelGraph, model: nn.Module) -> Sparsity:
    """Of `--slim` and `--soft-prune`; a step's loss sums over its images, and so does the penalty."""
    images = config.batch_size * accumulation(config.batch_size)
    slimming = Slimming(graph, model, config.slim * images) if config.slim else None
    score = {"sfp": l2, "fpgm": fpgm}.get(config.soft_prune)
    return Sparsity(slimming, SoftPruning(graph, score, config.soft_ratio) if score else None)
