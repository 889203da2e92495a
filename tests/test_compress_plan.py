"""Numbers of channels: limits and rounding by hand, budgets met on a real network."""
from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from channels import Net, conv, graph_of
from torch import Tensor, nn
from transplant import lived_in

from models.prune import channel_graph, remove_channels
from models.shuffle import ChannelSplit
from models.spec import load_spec
from models.yolo import DetectionModel
from utils.compress.graph import ChannelGraph
from utils.compress.importance import Scores, gamma
from utils.compress.plan import (
    Limits,
    best_of,
    check_reachable,
    fill,
    global_threshold,
    macs_share,
    meet,
    parameters_share,
    random_shares,
    uniform,
)
from utils.errors import UserError


class Halves(nn.Module):
    """A convolution and the halves of what it makes."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.conv, self.split = conv(c1, c2), ChannelSplit()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.split(self.conv(x))


def chain(first: int, second: int) -> ChannelGraph:
    """Groups a and b of 1x1 convolutions without bias."""
    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, first, bias=False), b=conv(first, second, bias=False), c=conv(second, 5, bias=False))
    return graph_of(net)


def equal_scores(graph: ChannelGraph) -> Scores:
    return {group.name: np.ones(len(group.channels)) for group in graph.groups}


@pytest.fixture(scope="module")
def yolov5n() -> tuple[ChannelGraph, list[str]]:
    model = DetectionModel(load_spec("yolov5n.yaml", 3))
    return channel_graph(model), [key for key, _ in model.named_parameters()]


@pytest.mark.parametrize(("total", "least", "round_to", "wanted", "count"), [
    (64, 0.1, 8, 30, 32), (64, 0.1, 8, 27, 24), (64, 0.1, 8, 28, 32),  # the nearest multiple; of two equally near the larger
    (64, 0.1, 8, 0, 8), (64, 0.5, 8, 0, 32), (64, 0.51, 8, 0, 40), (100, 0.55, 1, 0, 55), (64, 0, 8, 0, 8),  # never below the least
    (64, 0.1, 8, 64, 64), (64, 0.1, 8, 99, 64), (20, 0.1, 8, 20, 20), (20, 0.1, 8, 18, 20), (20, 0.1, 8, 17.9, 16),  # all are allowed
    (6, 0.1, 8, 3, 6), (6, 0.1, 8, 0, 6), (1, 0.1, 8, 0, 1),  # smaller than what it is rounded to: whole
    (10, 0, 1, 0, 1), (10, 0, 1, 4.4, 4), (10, 0.99, 1, 3, 10),
])  # fmt: skip
def test_how_many_may_stay(total: int, least: float, round_to: int, wanted: float, count: int):
    graph = chain(total, 8)
    found = Limits(least, round_to).count(graph, graph.groups[0], wanted)
    assert found == count and type(found) is int


@pytest.mark.parametrize(("groups", "round_to", "step", "count"), [(2, 8, 4, 8), (4, 8, 2, 6), (8, 8, 1, 3), (3, 8, 8, 8), (2, 3, 3, 6)])
def test_a_channel_that_is_made_several_times_is_rounded_by_what_the_layer_then_has(groups: int, round_to: int, step: int, count: int):
    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, 48), b=conv(48, 48, groups=groups), c=conv(48, 2))
    graph, limits = graph_of(net), Limits(0.1, round_to)
    group = graph.groups[0]
    assert len(group.channels) == 48 // groups and limits.step(graph, group) == step
    least = limits.count(graph, group, 0)
    assert least == min(s for s in range(step, 49, step) if s >= 0.1 * 48 / groups)
    found = limits.count(graph, group, count * 48 / groups / 24)
    layer = graph.keep({group.name: np.arange(len(group.channels)) < found})[graph.by_weight["a.weight"].outputs]
    assert int(layer.sum()) == found * groups and (found % step == 0 or found == len(group.channels))


def test_the_same_share_of_every_group():
    graph = chain(64, 32)
    make = uniform(graph, Limits(0.25, 8))
    for share, counts in ((0.5, (32, 16)), (1, (64, 32)), (0, (16, 8))):
        assert tuple(make(share).values()) == counts


def test_one_threshold_for_all_groups():
    graph = chain(4, 3)
    make = global_threshold(graph, Limits(0, 1), {"a.weight": np.array([1, 4, 2, 8]), "b.weight": np.array([3, 5, 9])})
    assert make(1) == {"a.weight": 4, "b.weight": 3}
    assert make(4 / 7) == {"a.weight": 2, "b.weight": 2}  # 4, 8 and 5, 9
    assert make(2 / 7) == {"a.weight": 1, "b.weight": 1}  # 8 and 9
    assert make(0) == {"a.weight": 1, "b.weight": 1}  # the least


def test_a_group_without_a_finite_score_stays():
    graph = chain(4, 3)
    make = global_threshold(graph, Limits(0, 1), {"a.weight": np.array([1.0, 4, 2, 8]), "b.weight": np.full(3, np.inf)})
    assert make(0.5) == {"a.weight": 2, "b.weight": 3}


def test_slimming_says_what_it_can_reach():
    """A group without a norm stays, whatever the least share is."""
    net = Net(lambda n, x: n.c(torch.cat((n.norm(n.a(x)), n.b(x)), 1)), a=conv(3, 8, bias=False), norm=nn.BatchNorm2d(8), b=conv(3, 24, bias=False),
              c=conv(32, 2, bias=False))
    graph = graph_of(net)
    make = global_threshold(graph, Limits(0.1, 1), gamma(graph, net.state_dict()))
    assert make(0) == {"a.weight": 1, "b.weight": 24}
    cost = macs_share(graph, equal_scores(graph))
    least = cost(make(0))
    assert least == pytest.approx((3 + 4 + 3 * 24 + 2 * 25) / (3 * 8 + 4 * 8 + 3 * 24 + 2 * 32))
    check_reachable(least, least, "--target-flops")
    with pytest.raises(UserError, match=rf"--target-flops 0.5: can't be reached: {math.ceil(1000 * least) / 1000:g} is the nearest"):
        check_reachable(least, 0.5, "--target-flops")
    with pytest.raises(UserError, match=r"--target-flops 0.5: can't be reached: 1 is the nearest that can be with this --min-ratio and --round-to"):
        check_reachable(1.0, 0.5, "--target-flops")
    with pytest.raises(UserError, match=r"can't be reached: 0\.72 is the nearest that can be .*, as measured now"):
        check_reachable(0.69, 0.5, "--target-latency", 0.03)
    with pytest.raises(UserError, match=r"as measured now, even the least network takes 0\.99 of the time"):
        check_reachable(0.99, 0.5, "--target-latency", 0.03)


def test_a_group_stays_whole_if_some_of_its_channels_pass_no_norm():
    graph = chain(4, 3)
    scores = {"a.weight": np.array([1, np.inf, 2, 8]), "b.weight": np.array([3.0, 5, 9])}
    make = global_threshold(graph, Limits(0, 1), scores)
    assert make(0) == {"a.weight": 4, "b.weight": 1} and make(2 / 3) == {"a.weight": 4, "b.weight": 2}


def test_random_shares_are_a_function_of_the_seed_and_grow():
    graph = chain(640, 320)
    makers = [random_shares(graph, Limits(0.1, 8), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert makers[0](0.5) == makers[1](0.5) != makers[2](0.5)
    plans = [makers[0](share) for share in np.linspace(0, 1, 20)]
    assert plans[0] == {"a.weight": 64, "b.weight": 32} and plans[-1] == {"a.weight": 640, "b.weight": 320}
    assert all(a[name] <= b[name] for a, b in pairwise(plans) for name in a)
    drawn = np.random.default_rng(0).uniform(0.1, 1, 2)  # even between the least and all
    assert list(makers[0](0.5).values()) == [8 * round(share * total / 8) for share, total in zip(drawn, (640, 320), strict=True)]


def test_the_highest_scores_stay_and_of_equal_ones_the_first():
    graph = chain(4, 3)
    keep = best_of(graph, {"a.weight": 2, "b.weight": 1}, {"a.weight": np.array([1, 5, 2, 5]), "b.weight": np.array([7, 7, 7])})
    a, b = graph.groups
    assert keep[a.channels].tolist() == [False, True, False, True] and keep[b.channels].tolist() == [True, False, False] and keep[0]


def test_a_layer_that_takes_a_part_of_a_group_keeps_an_input():
    def forward(n: Net, x: Tensor) -> Tensor:
        kept, worked = n.a(x)
        return n.c(torch.cat((kept, n.b(worked)), 1))

    net = Net(forward, a=Halves(3, 6), b=conv(3, 3), c=conv(6, 2))
    graph = graph_of(net)
    scores = {group.name: np.arange(len(group.channels), 0, -1.0) for group in graph.groups}  # the first half is the better one
    a = graph.uses["a.conv.weight"][0]
    assert best_of(graph, {group.name: 1 for group in graph.groups}, scores)[a].tolist() == [True, False, False, True, False, False]
    assert best_of(graph, {group.name: 4 for group in graph.groups}, scores)[a].tolist() == [True, True, True, True, False, False]


def test_a_layer_that_makes_a_part_of_a_group_keeps_an_output():
    net = Net(lambda n, x: n.d(torch.cat((n.a(x), n.b(x)), 1) + n.c(x)), a=conv(3, 3), b=conv(3, 3), c=conv(3, 6), d=conv(6, 2))
    graph = graph_of(net)
    (group,) = graph.groups
    scores = {group.name: np.array([6.0, 5, 4, 1, 2, 3])}  # what a makes is the better half
    keep = best_of(graph, {group.name: 2}, scores)
    assert [keep[graph.uses[f"{name}.weight"][0]].tolist() for name in "abc"] == [
        [True, True, False], [False, False, True], [True, True, False, False, False, True]]
    assert graph.widths(net, keep, {}) == {"a": (None, 2), "b": (None, 1), "c": (None, 3), "d": (3, None)}


def test_costs_are_those_of_the_very_channels_that_stay():
    model = lived_in(DetectionModel(load_spec("yolov5s-shuffle.yaml", 3)))
    graph = channel_graph(model)
    rng = np.random.default_rng(0)
    scores = {group.name: rng.random(len(group.channels)) for group in graph.groups}
    for share in (0.6, 0):  # in the end of each group one
        plan = uniform(graph, Limits(0, 1))(share)
        left = remove_channels(model, graph, best_of(graph, plan, scores))
        trained = [key for key, _ in model.named_parameters()]
        wanted = sum(p.numel() for p in left.parameters()) / sum(p.numel() for p in model.parameters())
        assert parameters_share(graph, scores, trained)(plan) == pytest.approx(wanted, abs=1e-12)
        assert all(maps.isfinite().all() for maps in left(torch.rand(1, 3, 64, 64)))


def test_shares_by_hand():
    graph = chain(8, 4)
    plan, scores = {"a.weight": 4, "b.weight": 2}, equal_scores(graph)
    whole, left = 3 * 8 + 8 * 4 + 4 * 5, 3 * 4 + 4 * 2 + 2 * 5
    assert macs_share(graph, scores)(plan) == pytest.approx(left / whole)
    assert parameters_share(graph, scores, ["a.weight", "b.weight", "c.weight"])(plan) == pytest.approx(left / whole)


def test_the_largest_plan_within_a_budget():
    graph = chain(64, 64)
    make, cost = uniform(graph, Limits(0, 1)), macs_share(graph, equal_scores(graph))
    plan = meet(make, cost, 0.5)
    kept = plan["a.weight"]
    assert plan == {"a.weight": kept, "b.weight": kept}
    assert cost(plan) <= 0.5 < cost({"a.weight": kept + 1, "b.weight": kept + 1})
    filled = fill(graph, plan, cost, 0.5, Limits(0, 1))
    assert cost(filled) <= 0.5 and all(kept <= count <= kept + 1 for count in filled.values())


@pytest.mark.parametrize("target", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("method", ["uniform", "random", "threshold"])
def test_budgets_of_a_real_network(yolov5n: tuple[ChannelGraph, list[str]], method: str, kind: str, target: float):
    graph, trained = yolov5n
    limits, rng = Limits(0.1, 8), np.random.default_rng(0)
    scores = {group.name: rng.random(len(group.channels)) for group in graph.groups}
    cost = macs_share(graph, scores) if kind == "flops" else parameters_share(graph, scores, trained)
    make = {"uniform": uniform(graph, limits), "random": random_shares(graph, limits, rng),
            "threshold": global_threshold(graph, limits, scores)}[method]
    plan = fill(graph, meet(make, cost, target), cost, target, limits)
    assert target - 0.02 < cost(plan) <= target
    for group in graph.groups:
        count, total = plan[group.name], len(group.channels)
        assert 0.1 * total <= count <= total and (count % 8 == 0 or count == total)
    removed = sum(len(group.channels) for group in graph.groups) - sum(plan.values())
    assert int(best_of(graph, plan, scores).sum()) == graph.count - removed


def test_an_unreachable_budget_names_one_that_can_be_reached(yolov5n: tuple[ChannelGraph, list[str]]):
    graph, _ = yolov5n
    make, cost = uniform(graph, Limits(0.3, 8)), macs_share(graph, equal_scores(graph))
    with pytest.raises(UserError, match=r"--target-flops 0.01: can't be reached: 0\.\d+ is the nearest that can be") as caught:
        check_reachable(cost(make(0)), 0.01, "--target-flops")
    nearest = float(re.search(r"reached: (0\.\d+)", str(caught.value)).group(1))
    check_reachable(cost(make(0)), nearest, "--target-flops")
    assert nearest - 0.001 < cost(meet(make, cost, nearest)) <= nearest
