"""Networks of a few layers whose channels can be followed by hand."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.compress.graph import ChannelGraph
from utils.compress.trace import trace_channels


class Net(nn.Module):
    """What `forward` says of some layers."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv(c1: int, c2: int, k: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(c1, c2, k, padding=k // 2, **options)


def graph_of(net: nn.Module, channels: int = 3) -> ChannelGraph:
    trace = trace_channels(net.eval(), torch.zeros(1, channels, 8, 8))
    return ChannelGraph(trace, {key: tensor.shape for key, tensor in net.state_dict().items()})
