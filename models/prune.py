"""A detector with fewer channels: which can go, and the network that is left."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch

from models.summary import count_macs
from models.yolo import DetectionModel
from utils.compress.graph import ChannelGraph
from utils.compress.trace import trace_channels
from utils.measure.runtimes import Run, pytorch_run
from utils.measure.timing import time_interleaved

_ROUNDS = 6
_ROWS = "model."  # prefix of the rows' names, which a spec leaves out


def channel_graph(model: DetectionModel, imgsz: int = 0) -> ChannelGraph:
    """The removable channels of a detector, and what each costs.

    Args:
        imgsz: pixels that costs are of: convolutions grow with it, squeeze-and-excitation doesn't, attention's products grow faster. 0: no matter.
    """
    model = model.eval()
    side = max(imgsz, 2 * model.max_stride)
    image = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    return ChannelGraph(trace_channels(model, image), shapes, int(count_macs(model, image)) if imgsz else 0)


def remove_channels(model: DetectionModel, graph: ChannelGraph, keep: np.ndarray) -> DetectionModel:
    """The network that is left of `model`, with its weights, in eval mode.

    Args:
        graph: of this model.
        keep: (channels,) bool, see ChannelGraph.
    """
    before = {_ROWS + name: sizes for name, sizes in model.spec.widths.items()}
    widths = {name.removeprefix(_ROWS): sizes for name, sizes in graph.widths(model, keep, before).items()}
    left = DetectionModel(dataclasses.replace(model.spec, widths=widths), model.names)
    left.load_state_dict(graph.cut(model.state_dict(), keep))
    return left.to(next(model.parameters()).device, memory_format=torch.channels_last).eval()


def latency_share(model: DetectionModel, graph: ChannelGraph, imgsz: int) -> Callable[[np.ndarray], float]:
    """A choice's latency, batch 1, eager fp32, as a share of the whole network's, which is timed beside it each time."""
    images = torch.full((1, 3, imgsz, imgsz), 0.5, device=next(model.parameters()).device)

    def run_of(network: DetectionModel) -> Run:
        return pytorch_run(network.fused().to(memory_format=torch.channels_last), images, torch.float32)

    whole = functools.cache(lambda: run_of(model))  # fused once, and only where latency is asked for

    def cost(keep: np.ndarray) -> float:
        runs = {"whole": whole(), "left": run_of(remove_channels(model, graph, keep))}
        latencies = time_interleaved(runs, _ROUNDS, title="latency").latencies
        return latencies["left"].p50_ms / latencies["whole"].p50_ms

    return cost
