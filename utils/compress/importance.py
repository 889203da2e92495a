"""How much each channel of a group matters: scores (n,) from the weights alone, compared within the group, or over all of them for slimming."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from utils.compress.graph import ChannelGraph, Group

Scores = dict[str, np.ndarray]  # group -> (n,), the higher the more it matters
Weights = Mapping[str, Tensor]


def l1(graph: ChannelGraph, weights: Weights) -> Scores:
    """L1 norm of a filter (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017)."""
    return _by_filters(graph, weights, lambda filters: filters.abs().sum(1))


def l2(graph: ChannelGraph, weights: Weights) -> Scores:
    """L2 norm of a filter, as soft filter pruning takes it (He et al., IJCAI 2018)."""
    return _by_filters(graph, weights, lambda filters: filters.norm(dim=1))


def fpgm(graph: ChannelGraph, weights: Weights) -> Scores:
    """Sum of a filter's distances to all others of its layer: the nearest to their geometric median goes first (He et al., CVPR 2019)."""
    return _by_filters(graph, weights, lambda filters: torch.cdist(filters, filters).sum(1))


def gamma(graph: ChannelGraph, weights: Weights) -> Scores:
    """Size of the batch-norm scale (Liu et al., network slimming, ICCV 2017): the mean over the norms that a channel passes; infinite without one."""
    total, norms = np.zeros(graph.count), np.zeros(graph.count)
    for key in graph.norms:
        (channels,) = graph.uses[key]
        np.add.at(total, channels, weights[key].abs().double().cpu().numpy())
        np.add.at(norms, channels, 1)
    mean = np.divide(total, norms, out=np.full(graph.count, np.inf), where=norms > 0)
    return {group.name: mean[group.channels] for group in graph.groups}


def _by_filters(graph: ChannelGraph, weights: Weights, measure: Callable[[Tensor], Tensor]) -> Scores:
    """The mean over the layers of a group that make a channel, each layer's in units of its own mean over those that it makes; a channel that a
    layer makes several times has their sum."""
    return {group.name: np.nanmean([_of_layer(graph, group, key, weights[key], measure) for key in group.layers], 0) for group in graph.groups}


def _of_layer(graph: ChannelGraph, group: Group, key: str, weight: Tensor, measure: Callable[[Tensor], Tensor]) -> np.ndarray:
    """nan where the layer doesn't make a channel of the group, as before a concatenation."""
    dim = graph.by_weight[key].out_dim
    filters = weight.detach().movedim(dim, 0).flatten(1).double().cpu()
    made = graph.uses[key][dim]
    total = np.bincount(made, measure(filters).numpy(), minlength=graph.count)[group.channels]
    total[~np.isin(group.channels, made)] = np.nan
    return total / max(np.nanmean(total), 1e-12)
