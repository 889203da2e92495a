"""Memory that a network needs at once, against sums by hand."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.measure.memory import peak_bytes

IMAGE = torch.rand(1, 4, 8, 8)  # 1024 bytes


class Net(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_layers_that_replace_one_another():
    """The first map (1024) lives while the second (2048) is made; ReLU takes nothing; the weights are 64 and 128 bytes."""
    network = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 1, bias=False))
    assert peak_bytes(network, IMAGE) == 64 + 128 + 1024 + 1024 + 2048


def test_what_is_dropped_makes_room():
    """x * 2, then its double and so on: two maps at once, never four."""
    assert peak_bytes(Net(lambda x: x.mul(2).mul(2).mul(2).mul(2)), IMAGE) == 1024 * 3


def test_views_take_nothing():
    def run(x: Tensor) -> Tensor:
        joined = torch.cat((x, x * 2), 1)  # 1024 and 2048
        return joined[:, :2].reshape(1, -1).t()

    assert peak_bytes(Net(run), IMAGE) == 1024 + 1024 + 2048
    assert peak_bytes(Net(lambda x: x[:, :2]), IMAGE) == 1024
