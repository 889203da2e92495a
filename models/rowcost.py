"""What each row of a network costs: counted, and measured while the network runs as it always does."""
from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from models.build import inputs_of
from models.spec import IMAGE
from models.summary import count_macs, count_parameters
from models.yolo import DetectionModel
from utils.measure.runtimes import pytorch_run
from utils.measure.timing import Latency, reference_convolution, time_interleaved


class RowCost(NamedTuple):
    """Of one row, for one image."""

    row: int
    module: str  # as the YAML names it
    parameters: int
    gflops: float  # 2 x MACs
    ms: float  # median
    gflops_share: float  # of the network's, 0..1
    ms_share: float


class RowCosts(NamedTuple):
    rows: list[RowCost]
    whole: Latency  # of the network, the clock's own time for each row included
    remark: str  # what a reader must know of the machine; empty where it was quiet


def row_costs(
    model: DetectionModel,
    imgsz: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 20,
    *,
    budget_s: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> RowCosts:
    """Parameters and GFLOPs of each row, and its median time in the fused network, channels last, batch 1.

    Args:
        imgsz: pixels, a multiple of the model's largest stride.
        rounds: forward passes, 3 or more; fewer where `budget_s` seconds are over.
    """
    network = model.fused().to(device, memory_format=torch.channels_last)
    now = _clock_after_work(device, clock)
    seconds: list[list[float]] = [[] for _ in network.model]
    for module, taken in zip(network.model, seconds, strict=True):
        _time_calls(module, taken, now)
    run = pytorch_run(network, torch.full((1, 3, imgsz, imgsz), 0.5, device=device), dtype)
    timings = time_interleaved({"network": run}, rounds, budget_s=budget_s, reference=reference_convolution(device), clock=clock, title="rows")
    whole = timings.latencies["network"]
    ms = [Latency.of(taken[-whole.runs :]).p50_ms for taken in seconds]  # the first ones were the warm-up's
    gflops = row_gflops(model, imgsz)
    gflops_shares, ms_shares = _shares(gflops), _shares(ms)
    rows = [
        RowCost(layer.row, layer.module, count_parameters(module), gflops[i], ms[i], gflops_shares[i], ms_shares[i])
        for i, (layer, module) in enumerate(zip(model.spec.layers, model.model, strict=True))
    ]
    return RowCosts(rows, whole, timings.remark)


@torch.no_grad()
def row_gflops(model: DetectionModel, imgsz: int) -> list[float]:
    """2 x multiply-accumulates of each row for one (imgsz x imgsz) image, in units of 1e9; their sum is `count_gflops` of the model."""
    model = copy.deepcopy(model).eval()
    kept: dict[int, Any] = {IMAGE: torch.zeros(1, 3, imgsz, imgsz, device=next(model.parameters()).device)}
    gflops = []
    for layer, module in zip(model.spec.layers, model.model, strict=True):
        inputs = inputs_of(layer, kept)
        gflops.append(2 * count_macs(module, inputs) / 1e9)
        kept[layer.row] = module(inputs)
    return gflops


def _clock_after_work(device: torch.device, clock: Callable[[], float]) -> Callable[[], float]:
    """The clock, read once the device has done what it was given."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    return now


def _time_calls(module: nn.Module, seconds: list[float], now: Callable[[], float]) -> None:
    """From here on append each call's duration to `seconds`."""
    began = 0.0

    def before(*_: object) -> None:
        nonlocal began
        began = now()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(lambda *_: seconds.append(now() - began))


def _shares(values: list[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 0.0 for value in values]


def cost_table(costs: RowCosts) -> str:
    """A line for each row and one for all."""
    lines = [f"{'row':>4}  {'module':<22}  {'params':>11}  {'GFLOPs':>8}  {'% GFLOPs':>8}  {'ms':>8}  {'% time':>7}"]
    for cost in costs.rows:
        lines.append(f"{cost.row:>4}  {cost.module:<22}  {cost.parameters:>11,}  {cost.gflops:>8.3f}  {100 * cost.gflops_share:>8.1f}  "
                     f"{cost.ms:>8.3f}  {100 * cost.ms_share:>7.1f}")
    parameters, gflops, ms = (sum(getattr(cost, key) for cost in costs.rows) for key in ("parameters", "gflops", "ms"))
    lines.append(f"{'':>4}  {'all':<22}  {parameters:>11,}  {gflops:>8.3f}  {'':>8}  {ms:>8.3f}")
    if costs.remark:
        lines.append(costs.remark)
    return "\n".join(lines)
