"""Scores of channels against numbers worked by hand."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from channels import Net, conv, graph_of
from torch import Tensor, nn

from utils.compress.importance import Scores, fpgm, gamma, l1, l2


def scores_of(measure, net: nn.Module, channels: int = 1, **weights: list) -> Scores:
    """The scores of a network with these weights, as one row of numbers a filter."""
    with torch.no_grad():
        for name, rows in weights.items():
            weight = net.get_submodule(name).weight
            weight.copy_(torch.tensor(rows, dtype=torch.float32).view(weight.shape))
    return measure(graph_of(net, channels), net.state_dict())


def chain(inputs: int, outputs: int) -> Net:
    return Net(lambda n, x: n.b(n.a(x)), a=conv(inputs, outputs), b=conv(outputs, 2))


def test_l1():
    scores = scores_of(l1, chain(2, 3), 2, a=[[1, 0], [-2, 0], [1, -2]])  # 1, 2, 3: mean 2
    assert scores.keys() == {"a.weight"} and scores["a.weight"].tolist() == [0.5, 1, 1.5]


def test_l2():
    assert scores_of(l2, chain(2, 2), 2, a=[[3, -4], [0, 15]])["a.weight"].tolist() == [0.5, 1.5]  # 5, 15


def test_fpgm_lets_the_middle_one_go_first():
    scores = scores_of(fpgm, chain(1, 3), a=[0, 1, 5])["a.weight"]  # distances 1 + 5, 1 + 4, 5 + 4
    assert scores == pytest.approx(np.array([6, 5, 9]) / (20 / 3))


def test_fpgm_of_filters_in_a_plane():
    scores = scores_of(fpgm, chain(2, 3), 2, a=[[0, 0], [3, 4], [3, 0]])["a.weight"]  # sides 5, 4, 3
    assert scores == pytest.approx(np.array([5 + 3, 5 + 4, 3 + 4]) / 8)


def test_layers_that_are_summed_have_an_equal_say():
    net = Net(lambda n, x: n.c(n.a(x) + n.b(x)), a=conv(1, 2), b=conv(1, 2), c=conv(2, 2))
    scores = scores_of(l1, net, a=[1, 3], b=[400, 400])
    assert scores["a.weight"].tolist() == [(0.5 + 1) / 2, (1.5 + 1) / 2]


def test_a_layer_that_makes_a_part_of_a_group_has_a_say_in_that_alone():
    net = Net(lambda n, x: n.d(torch.cat((n.a(x), n.b(x)), 1) + n.c(x)), a=conv(1, 1), b=conv(1, 3), c=conv(1, 4), d=conv(4, 2))
    scores = scores_of(l1, net, a=[7], b=[1, 2, 3], c=[1, 1, 1, 5])
    assert scores["a.weight"] == pytest.approx([(1 + 0.5) / 2, (0.5 + 0.5) / 2, (1 + 0.5) / 2, (1.5 + 2.5) / 2])


def test_a_channel_that_is_made_twice_has_the_sum():
    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(1, 4), b=conv(4, 2, groups=2), c=conv(2, 2))
    scores = scores_of(l1, net, a=[1, 2, 3, 6], b=[[2, 2], [1, 1]])
    assert scores["a.weight"] == pytest.approx([4 / 6, 8 / 6])  # 1 + 3 and 2 + 6
    assert scores["b.weight"].tolist() == [1]  # both groups' only output: one channel


def test_a_transposed_convolution_has_its_filters_along_the_other_dimension():
    net = Net(lambda n, x: n.b(n.a(x)), a=nn.ConvTranspose2d(2, 3, 1), b=conv(3, 2))
    scores = scores_of(l1, net, 2, a=[[1, 0, 1], [0, 2, 2]])  # input channels are its rows
    assert scores["a.weight"].tolist() == [0.5, 1, 1.5]


def test_gamma_is_the_mean_over_the_norms_that_a_channel_passes():
    def forward(n: Net, x: Tensor) -> Tensor:
        return n.d(n.second(n.c(n.first(n.a(x)))) + n.b(x))  # c is depthwise: what a makes passes both norms

    net = Net(forward, a=conv(1, 2), first=nn.BatchNorm2d(2), c=conv(2, 2, 3, groups=2), second=nn.BatchNorm2d(2), b=conv(1, 2), d=conv(2, 2))
    assert scores_of(gamma, net, first=[1, -2], second=[3, 0])["a.weight"].tolist() == [2, 1]


def test_gamma_without_a_norm_is_infinite():
    net = Net(lambda n, x: n.c(torch.cat((n.norm(n.a(x)), n.b(x)), 1)), a=conv(1, 2), norm=nn.BatchNorm2d(2), b=conv(1, 2), c=conv(4, 2))
    scores = scores_of(gamma, net, norm=[0.25, 1])
    assert scores["a.weight"].tolist() == [0.25, 1] and np.isinf(scores["b.weight"]).all()


@pytest.mark.parametrize("measure", [l1, l2, fpgm])
def test_a_layer_of_zeros_has_scores(measure):
    assert scores_of(measure, chain(1, 3), a=[0, 0, 0])["a.weight"].tolist() == [0, 0, 0]
