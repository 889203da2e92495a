"""Latency of many workloads, measured so that the machine's mood is the same for all of them, and known."""
from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from utils.log import is_main_process

_WARM_UPS = 2
_LEAST_ROUNDS = 3
_NOISY = 0.15  # networks that differ by less than so much could not be ranked


class Latency(NamedTuple):
    """Of one workload."""

    p50_ms: float
    p90_ms: float
    spread: float  # (p90 - p10) / p50
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Of one duration or more."""
        p10, p50, p90 = (float(ms) for ms in np.quantile(seconds, (0.1, 0.5, 0.9)) * 1e3)
        return cls(p50, p90, (p90 - p10) / p50 if p50 else 0.0, len(seconds))


class Timings(NamedTuple):
    """Of workloads that were timed in turn."""

    latencies: dict[str, Latency]
    reference: Latency  # of a workload that is always the same, timed beside them

    @property
    def noisy(self) -> bool:
        return self.reference.spread > _NOISY

    @property
    def remark(self) -> str:
        """What a reader must know of the machine; empty where it was quiet."""
        if not self.noisy:
            return ""
        told = f"noisy: the reference convolution itself varied by {self.reference.spread:.0%}"
        typical = float(np.median([latency.spread for latency in self.latencies.values()] or [self.reference.spread]))
        if typical <= _NOISY:  # as beside OpenVINO, whose threads stay awake: the reference's two may share a core for a while
            told += f", though what was timed varied by {typical:.0%} only"
        return f"{told}: measure again when nothing else runs"


def reference_convolution(device: torch.device | str = "cpu") -> Callable[[], object]:
    """A fixed workload: one fp32 convolution, 64 -> 64 channels, 3x3 on 80x80, done when it returns."""
    image = torch.ones(1, 64, 80, 80, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> None:
        F.conv2d(image, weight, padding=1)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)

    return run


def time_interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    budget_s: float = math.inf,
    reference: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    title: str = "timing",
) -> Timings:
    """Warm every workload up, then time them in rounds, in each of which every one and the reference run once.

    What slows the machine for a while so slows all of them, and the order changes from round to round, so that none always has the same
    place or comes after the same one.

    Args:
        runs: each is done when it returns.
        rounds: at most; 3 or more.
        budget_s: no further round begins that would probably end after so many seconds, warm-up included; but 3 are always run.
        reference: a workload that is always the same; None: `reference_convolution` on the CPU.
    """
    if rounds < _LEAST_ROUNDS:
        raise ValueError(f"{rounds} rounds say nothing of the spread: take {_LEAST_ROUNDS} or more")
    works = [reference or reference_convolution(), *runs.values()]
    seconds: list[list[float]] = [[] for _ in works]
    bar = tqdm(total=len(works) * (_WARM_UPS + rounds), desc=title, leave=False, dynamic_ncols=True, disable=not is_main_process())
    with bar, _no_garbage_collection():
        start = clock()
        for _ in range(_WARM_UPS):
            for work in works:
                work()
                bar.update()
        round_s = 0.0
        for n in range(rounds):
            round_start = clock()
            if n >= _LEAST_ROUNDS and round_start - start + round_s > budget_s:
                break
            for i in _order(len(works), n):
                began = clock()
                works[i]()
                seconds[i].append(clock() - began)
                bar.update()
            round_s = clock() - round_start
    reference_latency, *latencies = (Latency.of(taken) for taken in seconds)
    return Timings(dict(zip(runs, latencies, strict=True)), reference_latency)


def _order(count: int, n: int) -> list[int]:
    """Of round n: every other round is the one before backwards, and after two of them another one begins."""
    first = n // 2 % count
    order = [*range(first, count), *range(first)]
    return order[::-1] if n % 2 else order


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection takes as long as a small network, and hits whichever is running."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
