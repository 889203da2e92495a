"""What rounding a layer costs: numbers by hand, the layer that suffers most found, the network left as it was."""
from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from tiny import lively, tiny_model
from torch import nn

from utils.compress.sensitivity import Sensitivity, _channel_mean, layer_sensitivities, output_sqnr_db, write_sensitivities
from utils.plots.sensitivity import draw_sensitivities


def test_signal_to_noise_by_hand():
    def raw(objectness: float, cls: float) -> torch.Tensor:
        return torch.tensor((0.5, 0.5, 0.5, 0.5, objectness, cls)).logit().view(1, 1, 1, 1, 6)

    reference = torch.cat((raw(0.8, 0.5), raw(1e-6, 0.5)), 3)
    moved = torch.cat((raw(0.8, 0.6), raw(1e-6, 0.9)), 3)  # no object is where the second one is
    signal, noise = 0.8 * (5 * 0.25 + 0.64), 0.8 * 0.01
    assert output_sqnr_db([reference], [moved]) == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
    assert output_sqnr_db([reference], [reference]) > 100


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> nn.Module:
    return lively(tiny_model(tmp_path_factory.mktemp("tiny"), width=16))


def test_the_layer_that_suffers_most_is_first(network):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    found = layer_sensitivities(network, images)
    assert sorted(s.layer for s in found) == sorted(layers) and [s.sqnr_db for s in found] == sorted(s.sqnr_db for s in found)
    assert all(10 < s.sqnr_db < 80 for s in found)

    victim = dict(network.named_modules())["model.2.conv"]
    kept = victim.weight.clone()
    try:  # a weight so large that the others of its channel round to nothing; it reads a channel that is then made to be silent
        before = dict(network.named_modules())["model.1.conv"]
        before.weight[3], before.bias[3] = 0, 0
        victim.weight[:, 3] = 1000
        assert layer_sensitivities(network, images)[0].layer == "model.2.conv"
    finally:
        victim.weight.copy_(kept)


def test_the_network_is_left_as_it_was(network):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.rand(1, 3, 64, 64)
    maps = [m.clone() for m in network(images)]
    layer_sensitivities(network, images)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(a, b) for a, b in zip(network(images), maps, strict=True))


def test_fewer_levels_cost_more(network):
    images = torch.rand(1, 3, 64, 64)
    fine, coarse = (dict(layer_sensitivities(network, images, levels)) for levels in (127, 8))
    assert all(fine[layer] > coarse[layer] for layer in fine)


def test_table_and_picture(tmp_path: Path):
    found = [Sensitivity("model.9.cv1.conv", 12.34567), Sensitivity("model.0.$conv", 40.0)]
    write_sensitivities(tmp_path / "a.csv", found, ("model.0.$conv",))
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [["layer", "sqnr_db", "float"], ["model.9.cv1.conv", "12.346", "0"], ["model.0.$conv", "40.000", "1"]]
    for kept in ((), ("model.0.$conv",)):
        draw_sensitivities(tmp_path / "a.png", found, kept, "a_network.pt: $one$")
        assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_mean_of_a_channel_is_over_all_else() -> None:
    """Swin's linear layers read maps with the channels last."""
    output = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(_channel_mean(nn.Linear(3, 7), output), output.flatten(0, 2).mean(0))
    torch.testing.assert_close(_channel_mean(nn.Conv2d(3, 4, 1), output).flatten(), output.transpose(0, 1).flatten(1).mean(1))
