"""How many channels each group keeps, so that the network costs what was asked for."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from utils.compress.graph import ChannelGraph, Group
from utils.compress.importance import Scores
from utils.errors import UserError

Plan = dict[str, int]  # group -> channels that it keeps
Maker = Callable[[float], Plan]  # of a share: 0 keeps the least, 1 everything
Cost = Callable[[Plan], float]  # as a share of the whole network's

_HALVINGS = 20
_SLACK = 1e-9  # 0.55 * 100 is a little more than 55


class Limits(NamedTuple):
    """What every plan respects."""

    least: float  # share of a group's channels that stays
    round_to: int  # numbers of channels are multiples of it, for the vectors of a processor

    def count(self, graph: ChannelGraph, group: Group, wanted: float) -> int:
        """The nearest number of channels that may stay."""
        total, step = len(group.channels), self.step(graph, group)
        least = min(total, max(1, math.ceil(self.least * total / step - _SLACK)) * step)
        below = int(min(wanted, total) // step) * step
        above = min(below + step, total)  # all of them are allowed, whatever their number
        return max(least, above if above - wanted <= wanted - below else below)

    def step(self, graph: ChannelGraph, group: Group) -> int:
        """A layer may make a channel several times, as ShuffleNet's and RegNet's groups do."""
        layer = graph.by_weight[group.layers[0]]
        times = max(1, int(np.isin(layer.outputs, group.channels).sum()) // len(group.channels))
        return self.round_to // math.gcd(self.round_to, times)


def uniform(graph: ChannelGraph, limits: Limits) -> Maker:
    """The same share of every group."""
    def make(share: float) -> Plan:
        return {group.name: limits.count(graph, group, share * len(group.channels)) for group in graph.groups}

    return make


def global_threshold(graph: ChannelGraph, limits: Limits, scores: Scores) -> Maker:
    """Of all groups together those above one threshold (network slimming); a group with a score that is not finite stays whole."""
    compared = {name: own for name, own in scores.items() if np.isfinite(own).all()}
    everyone = np.append(np.sort(np.concatenate([*compared.values(), np.zeros(0)])), np.inf)  # at share 0 none is above it, however many are equal

    def make(share: float) -> Plan:
        threshold = everyone[int((1 - share) * (len(everyone) - 1))] if share < 1 else -np.inf
        return {group.name: limits.count(graph, group, int((compared[group.name] >= threshold).sum())) if group.name in compared
                else len(group.channels) for group in graph.groups}

    return make


def random_shares(graph: ChannelGraph, limits: Limits, rng: np.random.Generator) -> Maker:
    """A share of its own for each group, drawn evenly between the least and all; raised to one power together to meet a budget."""
    drawn = {group.name: rng.uniform(limits.least, 1) for group in graph.groups}

    def make(share: float) -> Plan:
        power = (1 - share) / max(share, 1e-6)
        return {group.name: limits.count(graph, group, drawn[group.name] ** power * len(group.channels)) for group in graph.groups}

    return make


def best_of(graph: ChannelGraph, plan: Plan, scores: Scores) -> np.ndarray:
    """The choice that a plan leaves: of each group the channels of the highest scores; of equal ones the first.

    A layer that takes a part of a group, as after ShuffleNet's split, or makes one, as before a concatenation that is summed with another layer's
    outputs, may be left with none: the best of its own stays too.
    """
    return _first(graph, plan, _ranks(graph, scores))


def _ranks(graph: ChannelGraph, scores: Scores) -> np.ndarray:
    """(channels,) each one's place in its group, the best is 0."""
    ranks = np.zeros(graph.count, int)
    for group in graph.groups:
        ranks[group.channels[np.argsort(-scores[group.name], kind="stable")]] = np.arange(len(group.channels))
    return ranks


def _first(graph: ChannelGraph, plan: Plan, ranks: np.ndarray) -> np.ndarray:
    keep = graph.keep({group.name: ranks[group.channels] < plan[group.name] for group in graph.groups})
    for layer in graph.layers:
        for own in (layer.inputs, layer.outputs):
            if not keep[own].any():
                keep[own[np.argmin(ranks[own])]] = True
    return keep


def check_reachable(least: float, target: float, what: str, noise: float = 0.0) -> None:
    """Refuse a budget that no plan meets.

    Args:
        least: what the least plan costs.
        noise: share by which the same may cost another time, as of what is measured.

    Raises:
        UserError: even the least plan costs more; the line says how much.
    """
    if least > target:
        digits = 100 if noise else 1000
        nearest = math.ceil(least * (1 + noise) * digits) / digits
        if noise and nearest >= 1:
            raise UserError(f"{what} {target:g}: can't be reached: as measured now, even the least network takes {least:.2f} of the time")
        raise UserError(f"{what} {target:g}: can't be reached: {nearest:g} is the nearest that can be with this --min-ratio and --round-to"
                        f"{', as measured now' if noise else ''}")


def meet(make: Maker, cost: Cost, target: float) -> Plan:
    """The plan of the largest share whose cost is not above the target; the least plan where none is, see `check_reachable`."""
    low, high = 0.0, 1.0
    best, beyond = make(low), make(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        plan = make(middle)
        if plan == best or (plan != beyond and cost(plan) <= target):
            low, best = middle, plan
        else:
            high, beyond = middle, plan
    return best


def fill(graph: ChannelGraph, plan: Plan, cost: Cost, target: float, limits: Limits) -> Plan:
    """The plan with a step more wherever the budget still allows it, those groups first that keep the smallest share."""
    plan = dict(plan)
    for group in sorted(graph.groups, key=lambda group: plan[group.name] / len(group.channels)):
        wider = plan | {group.name: limits.count(graph, group, plan[group.name] + limits.step(graph, group))}
        if cost(wider) <= target:
            plan = wider
    return plan


def macs_share(graph: ChannelGraph, scores: Scores) -> Cost:
    """Of the very channels that stay: after a split it matters which of a group's those are."""
    ranks, whole = _ranks(graph, scores), graph.macs(graph.everything)
    return lambda plan: graph.macs(_first(graph, plan, ranks)) / whole


def parameters_share(graph: ChannelGraph, scores: Scores, trained: list[str]) -> Cost:
    ranks, whole = _ranks(graph, scores), graph.parameters(graph.everything, trained)
    return lambda plan: graph.parameters(_first(graph, plan, ranks), trained) / whole
