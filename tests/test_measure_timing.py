"""Timing of many workloads, on a clock that only the workloads advance."""
from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from utils.measure.timing import Latency, Timings, reference_convolution, time_interleaved


class Machine:
    """A clock and workloads that take as long as they say, times how slow the machine is at the moment."""

    def __init__(self, slow: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now, self.slow, self.calls = 0.0, slow, []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[int], float] | float = 1.0) -> Callable[[], None]:
        def run() -> None:
            taken = seconds(self.calls.count(name)) if callable(seconds) else seconds
            self.calls.append(name)
            self.now += taken * self.slow(self.now)

        return run

    def time(self, runs: dict[str, Callable[[int], float] | float], rounds: int = 10, reference: Callable[[int], float] | float = 0.0,
             budget_s: float = float("inf")) -> Timings:
        works = {name: self.work(name, seconds) for name, seconds in runs.items()}
        return time_interleaved(works, rounds, budget_s=budget_s, reference=self.work("reference", reference), clock=self.clock)


def test_quantiles_by_hand():
    latency = Latency.of([n / 1000 for n in (7, 1, 2, 3, 11, 4, 5, 6, 8, 9, 10)])
    assert latency == pytest.approx((6, 10, (10 - 2) / 6, 11))
    assert Latency.of([0.004]) == pytest.approx((4, 4, 0, 1))
    assert Latency.of([0.0, 0.0]) == (0, 0, 0, 2)


def test_every_round_runs_each_once_and_the_reference_beside_them():
    machine = Machine()
    timings = machine.time({"a": 1, "b": 2, "c": 3}, rounds=8, reference=0.5)
    assert list(timings.latencies) == ["a", "b", "c"]
    assert [latency.p50_ms for latency in timings.latencies.values()] == pytest.approx([1000, 2000, 3000])
    assert timings.reference.p50_ms == pytest.approx(500)
    rounds = [machine.calls[i : i + 4] for i in range(0, len(machine.calls), 4)][2:]  # after the warm-up
    assert len(rounds) == 8 and all(sorted(one) == ["a", "b", "c", "reference"] for one in rounds)
    assert all(latency.runs == 8 for latency in (*timings.latencies.values(), timings.reference))


def test_none_always_has_the_same_place_or_follows_the_same_one():
    machine = Machine()
    machine.time(dict.fromkeys("abc", 1.0), rounds=8)
    rounds = [machine.calls[i : i + 4] for i in range(8, len(machine.calls), 4)]
    for name in ("a", "b", "c", "reference"):
        assert {one.index(name) for one in rounds} == {0, 1, 2, 3}
    before_a = {one[one.index("a") - 1] for one in rounds if one[0] != "a"}
    assert len(before_a) >= 2


def test_the_warm_up_does_not_count():
    timings = Machine().time({"a": lambda call: 1.0 if call >= 2 else 100.0}, rounds=3)
    assert timings.latencies["a"] == pytest.approx((1000, 1000, 0, 3))


def test_a_machine_that_slows_down_slows_all_of_them():
    half = 2 * 24 + 5 * 24  # two warm-ups and half of the ten rounds, 24 s each
    timings = Machine(lambda now: 1.0 if now < half else 3.0).time({"small": 4, "large": 12}, rounds=10, reference=8)
    small, large = timings.latencies.values()
    assert large.p50_ms / small.p50_ms == pytest.approx(3)
    assert small.spread == pytest.approx(large.spread) == pytest.approx(timings.reference.spread)
    assert timings.noisy and "noisy" in timings.remark


@pytest.mark.parametrize(("swing", "noisy"), [(0.0, False), (0.1, False), (0.5, True)])
def test_the_reference_says_whether_the_machine_was_noisy(swing: float, noisy: bool):
    """Half of its runs take 1 s, half 1 + swing: p10 and p90 are these, p50 the middle."""
    timings = Machine().time({"a": lambda call: 1.0 + call % 5}, rounds=10, reference=lambda call: 1 + swing * (call % 2))
    assert timings.reference.spread == pytest.approx(swing / (1 + swing / 2))
    assert timings.noisy == noisy
    assert timings.remark.startswith("noisy: the reference convolution itself varied by 40%") if noisy else timings.remark == ""


def test_the_remark_says_whether_the_workloads_varied_too():
    def swinging(call: int) -> float:
        return 1.0 + call % 2

    steady = Machine().time({"a": 1.0, "b": 2.0, "c": swinging}, reference=swinging)
    assert steady.noisy and "the reference convolution itself varied by 67%, though what was timed varied by 0% only: measure" in steady.remark
    assert "varied by 67%: measure" in Machine().time({"a": 1.0, "b": swinging, "c": swinging}, reference=swinging).remark
    assert not Machine().time({"a": swinging}, reference=1.0).noisy, "a network may vary by itself"


@pytest.mark.parametrize(("budget_s", "rounds"), [(0, 3), (49, 3), (60, 4), (69.9, 4), (70, 5), (1000, 20)])
def test_the_budget_ends_the_rounds_but_not_before_three(budget_s: float, rounds: int):
    """A round takes 10 s, the warm-up 20."""
    timings = Machine().time({"slow": 9.0, "fast": 0.5}, rounds=20, reference=0.5, budget_s=budget_s)
    assert timings.latencies["slow"].runs == timings.latencies["fast"].runs == timings.reference.runs == rounds


def test_too_few_rounds():
    with pytest.raises(ValueError, match="2 rounds say nothing of the spread"):
        Machine().time({"a": 1.0}, rounds=2)


def test_nothing_but_the_reference():
    timings = Machine().time({}, rounds=3, reference=1.0)
    assert timings == ({}, pytest.approx((1000, 1000, 0, 3)))


def test_a_workload_may_have_any_name():
    assert list(Machine().time({"reference convolution": 1.0, "": 2.0}, rounds=3).latencies) == ["reference convolution", ""]


def test_garbage_is_not_collected_meanwhile_and_is_again_after_a_failure():
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        time_interleaved({"a": fail}, 3, reference=lambda: None)
    assert seen == [False] and gc.isenabled()


def test_the_reference_convolution_is_always_the_same_and_leaves_the_random_state():
    before = torch.get_rng_state()
    timings = time_interleaved({"same": reference_convolution()}, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert timings.reference.p50_ms > 0 and timings.latencies["same"].runs == 3
