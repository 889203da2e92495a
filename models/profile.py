"""What several networks cost, counted and measured side by side on this machine."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from models.rowcost import cost_table, row_costs
from models.spec import load_spec
from models.summary import count_gflops, count_parameters
from models.yolo import DetectionModel, load_model
from utils.checkpoint import Checkpoint, for_inference, save_checkpoint
from utils.compare.rows import Profile
from utils.device import describe
from utils.errors import UserError
from utils.measure.memory import peak_bytes
from utils.measure.runtimes import Run, Runtime
from utils.measure.timing import reference_convolution, time_interleaved
from utils.plots.cost import draw_row_costs

_ROUNDS = 20
_BUDGET_S = 20.0  # of one runtime and batch size, all networks together, if three rounds fit into it
_SLOWEST_S = 2.0  # a batch that takes longer is not measured: it would take the machine from all the others


def build(cfg: str, names: Sequence[str]) -> DetectionModel:
    """The network of a YAML, random weights, for these classes or as many as it says."""
    return DetectionModel(load_spec(cfg, len(names) or None), names).eval()


def load(weights: Path) -> DetectionModel:
    return load_model(str(weights))


def count(model: DetectionModel, imgsz: int) -> Profile:
    """All but the latencies, for one image of `imgsz` pixels."""
    fused = model.fused()
    memory = peak_bytes(fused, torch.zeros(1, 3, imgsz, imgsz, device=next(fused.parameters()).device))
    return Profile(count_parameters(model), count_gflops(model, imgsz), _file_bytes(model) / 1e6, memory / 1e6)


def _file_bytes(model: DetectionModel) -> int:
    """Of a best.pt."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best.pt"
        save_checkpoint(path, Checkpoint(model.spec.to_dict(), model.names, for_inference(model.state_dict())))
        return path.stat().st_size


def measure_latencies(
    models: Mapping[str, DetectionModel], profiles: Mapping[str, Profile], imgsz: int, runtimes: Sequence[Runtime], batches: Sequence[int],
    device: torch.device,
) -> Iterator[list[str]]:
    """Time all networks in turn, runtime by runtime and batch size by batch size, and note it in their profiles.

    Args:
        models: by name; each is fused here.
        batches: sizes, the smallest first.
        imgsz: pixels; a network whose strides it does not fit takes the next size that they do.

    Yields:
        After each runtime, remarks: where the machine was not quiet, and what was too slow to measure.
    """
    fused = {name: model.fused().to(device, memory_format=torch.channels_last) for name, model in models.items()}
    for runtime in runtimes:
        remarks = []
        for batch in batches:
            runs: dict[str, Run] = {}
            for name in tqdm(fused, desc=f"{runtime.name} b{batch}", leave=False, dynamic_ncols=True):
                smaller = {b: ms for b in batches if b < batch and (ms := profiles[name].p50(runtime.name, b))}
                if any(ms / b * batch > _SLOWEST_S * 1e3 for b, ms in smaller.items()):
                    remarks.append(f"{name} in {runtime.name}, batch {batch}: over {_SLOWEST_S:g} s, by its time at a smaller batch; not measured")
                    continue
                try:
                    runs[name] = _prepare(runtime, fused[name], models[name].whole_strides(imgsz), batch, device)
                except UserError as error:
                    profiles[name].problems.append(f"batch {batch}: {error}")
            if runs:
                timings = time_interleaved(runs, _ROUNDS, budget_s=_BUDGET_S, reference=reference_convolution(device),
                                           title=f"{runtime.name} b{batch}")
                for name, latency in timings.latencies.items():
                    profiles[name].latency[runtime.name, batch] = latency
                if timings.remark:
                    remarks.append(f"{runtime.name}, batch {batch}: {timings.remark}")
        yield remarks


def _prepare(runtime: Runtime, network: nn.Module, imgsz: int, batch: int, device: torch.device) -> Run:
    return runtime.prepare(network, torch.full((batch, 3, imgsz, imgsz), 0.5, device=device))


def draw_rows(model: DetectionModel, imgsz: int, device: torch.device, dtype: torch.dtype, out: Path | None) -> str:
    """A table of what each row costs, and its picture in `out`."""
    costs = row_costs(model.to(device), imgsz, device, dtype, _ROUNDS, budget_s=_BUDGET_S)
    if out:
        rows = [(f"{cost.row} {cost.module}", cost.gflops_share, cost.ms_share) for cost in costs.rows]
        draw_row_costs(out, rows, f"{model.spec.origin}, {imgsz} px, batch 1: {describe(device, dtype)}")
    return cost_table(costs)
