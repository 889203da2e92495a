"""Slimming's penalty and soft pruning's zeros, and what pruning makes of them."""
from __future__ import annotations

import copy
import csv

import numpy as np
import pytest
import torch
from channels import Net, conv, graph_of
from tiny import tiny_model, train_flags
from torch import nn
from transplant import lived_in

from models.prune import channel_graph, remove_channels
from models.spec import load_spec
from models.yolo import DetectionModel, load_model
from train import main
from utils.checkpoint import load_checkpoint
from utils.compress.graph import is_depthwise
from utils.compress.importance import fpgm, l2
from utils.compress.plan import Limits, best_of, uniform
from utils.config import TrainConfig
from utils.errors import UserError
from utils.training.ema import ModelEma
from utils.training.optim import freeze_rows
from utils.training.schedule import StepSettings
from utils.training.sparsity import GAMMA_BINS, Slimming, SoftPruning, build_sparsity
from utils.training.state import TrainState
from utils.training.stepper import Stepper


def scales(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_the_penalty_is_the_subgradient_of_l1(tmp_path):
    model = tiny_model(tmp_path)
    slimming = Slimming(channel_graph(model), model, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first = scales(model)[0]
    with torch.no_grad():
        first[:3] = torch.tensor([-2.0, 0.0, 3.0])
    slimming(1)
    assert first.grad[:3].tolist() == [0.5, 1.0, 1.5]
    slimming(2)  # images' losses are summed, and so is what each adds
    assert first.grad[:3].tolist() == [-0.5, 1.0, 2.5]
    for name, parameter in model.named_parameters():
        assert name.endswith("bn.weight") or (parameter.grad == 1).all()


def test_the_histogram_counts_every_scale(tmp_path):
    model = tiny_model(tmp_path)
    slimming = Slimming(channel_graph(model), model, 0.5)
    with torch.no_grad():
        for scale in scales(model):
            scale.fill_(0.001)
        scales(model)[0][:2] = torch.tensor([-1.01, 7.0])
    counts, total = slimming.histogram(), sum(map(len, scales(model)))
    assert sum(counts) == total and counts[0] == total - 2 and counts[-1] == 1 and counts[np.searchsorted(GAMMA_BINS, 1.01) - 1] == 1
    assert slimming.sparsity() == pytest.approx((total - 2) / total)


@pytest.mark.parametrize("name", ["yolov5n-ghost.yaml", "yolov5s-shuffle.yaml", "yolov5n-mobilenetv3-small.yaml"])
@pytest.mark.parametrize("score", [l2, fpgm])
def test_zeroed_filters_can_go_without_a_trace(name, score):
    torch.manual_seed(0)
    model = lived_in(DetectionModel(load_spec(name, 2)))
    average = copy.deepcopy(model)
    graph = channel_graph(model)
    SoftPruning(graph, model, score, 0.4)(model, average)
    keep = best_of(graph, uniform(graph, Limits(0.0, 1))(0.6), l2(graph, average.state_dict()))
    left = remove_channels(average, graph, keep)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(average(images), left(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in left.parameters()) < 0.6 * sum(p.numel() for p in average.parameters())


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5s-shuffle.yaml", "yolov5n-ghost.yaml", "yolov5n-ghostnet-0.5x.yaml", "yolov5s-lcnet.yaml"])
def test_gradients_find_zeroed_filters_again(name):
    torch.manual_seed(0)
    model = lived_in(DetectionModel(load_spec(name, 2)))
    graph = channel_graph(model)
    SoftPruning(graph, model, l2, 0.5)(model, copy.deepcopy(model))
    sum(raw.square().sum() for raw in model.train()(torch.rand(2, 3, 64, 64))).backward()
    parameters, zeroed, lost = dict(model.named_parameters()), 0, 0
    for layer in graph.layers:
        if not is_depthwise(layer):
            filters, gradients = (t.detach().movedim(layer.out_dim, 0).flatten(1).norm(dim=1) for t in (
                parameters[layer.weight], parameters[layer.weight].grad))
            zeroed += int((filters == 0).sum())
            lost += int(((filters == 0) & (gradients == 0)).sum())
    assert zeroed > 500 and lost < 0.02 * zeroed, f"{lost} of {zeroed} are dead"


def test_frozen_filters_are_left_alone(tmp_path):
    model = lived_in(tiny_model(tmp_path))
    freeze_rows(model, (1, 3))
    before = copy.deepcopy(model.state_dict())
    SoftPruning(channel_graph(model), model, l2, 0.5)(model, copy.deepcopy(model))
    for row, layer in enumerate(model.model[:-1]):
        zero = layer.conv.weight.flatten(1).norm(dim=1) == 0
        assert zero.sum() == (0 if row in (1, 3) else len(zero) // 2)
        assert all(torch.equal(tensor, before[f"model.{row}.{key}"]) for key, tensor in layer.state_dict().items()) == (row in (1, 3))


def test_what_passes_through_a_frozen_layer_is_left_alone():
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        return n.d(n.c(n.norm(n.depthwise(n.a(x)))) + n.b(x))

    for frozen in ("depthwise", "norm"):
        net = Net(forward, a=conv(3, 4), depthwise=conv(4, 4, 3, groups=4, bias=False), norm=nn.BatchNorm2d(4), c=conv(4, 6),
                  b=conv(3, 6), d=conv(6, 2))
        net.get_submodule(frozen).requires_grad_(False)
        soft = SoftPruning(graph_of(net), net, l2, 0.5)
        blocked = frozen == "norm"  # a depthwise filter passes gradients on, frozen or not
        assert soft.plan == {"a.weight": 4 if blocked else 2, "c.weight": 3}


@pytest.mark.parametrize(("settings", "line"), [
    (TrainConfig(slim=1e-4), "--slim: no channel of this network that can be removed passes a batch norm"),
    (TrainConfig(soft_prune="sfp"), "--soft-prune: no layer of this network can lose filters"),
])
def test_nothing_to_work_on(settings, line):
    net = Net(lambda n, x: n.norm(n.a(x)), a=conv(3, 4), norm=nn.BatchNorm2d(4))  # an output keeps its channels
    with pytest.raises(UserError, match=line):
        build_sparsity(settings, graph_of(net), net)


def test_filters_are_zeroed_after_each_epoch(tmp_path):
    assert main([*train_flags(tmp_path), "--soft-prune", "sfp", "--epochs", "3", "--save-period", "1"]) == 0
    for epoch in (1, 2, 3):
        weight = load_model(str(tmp_path / f"runs/exp/weights/epoch{epoch}.pt")).model[0].conv.weight
        assert (weight.flatten(1).norm(dim=1) == 0).sum() == len(weight) // 2


@pytest.mark.parametrize("flags", [["--slim", "0.01"], ["--soft-prune", "sfp"], ["--soft-prune", "fpgm", "--soft-ratio", "0.3"]])
def test_training(tmp_path, flags):
    assert main([*train_flags(tmp_path), *flags]) == 0
    with open(tmp_path / "runs/exp/results.csv") as file:
        assert ("slim/near_zero" in next(csv.reader(file))) == ("--slim" in flags)
    norms = load_model(str(tmp_path / "runs/exp/weights/last.pt")).model[0].conv.weight.flatten(1).norm(dim=1)
    zeros = {"--slim": 0, "--soft-prune": round(len(norms) * (0.3 if "0.3" in flags else 0.5))}
    assert (norms == 0).sum() == zeros[flags[0]]


def test_slimming_makes_scales_smaller(tmp_path):
    sizes = {}
    for strength in ("0", "0.3"):
        (tmp_path / strength).mkdir()
        assert main([*train_flags(tmp_path / strength), "--slim", strength]) == 0
        network = load_model(str(tmp_path / strength / "runs/exp/weights/last.pt"))
        sizes[strength] = torch.cat([scale.detach().abs() for scale in scales(network)])
    assert (sizes["0.3"] < sizes["0"]).all()


def test_the_penalty_comes_once_gradients_are_unscaled():
    """Before, it would be divided by the scale, which is in the thousands."""
    layer, seen = nn.Linear(2, 1, bias=False), []
    stepper = Stepper(layer, torch.optim.SGD(layer.parameters(), 0.1), ModelEma(layer), torch.device("cpu"), torch.float16,
                      lambda images: seen.append((images, layer.weight.grad.clone())))
    stepper.backward(layer(torch.tensor([[1.0, 2.0]])).sum(), StepSettings(0.1, 0.1, 0.0, 1), 3)
    ((images, gradient),) = seen
    assert stepper.scaler.is_enabled() and images == 3
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 2.0]]))


def test_the_scales_are_drawn(tmp_path):
    words = [word for word in train_flags(tmp_path) if word != "--noplots"]
    assert main([*words, "--slim", "0.01"]) == 0
    assert (tmp_path / "runs/exp/gammas.png").stat().st_size > 5000
    training = load_checkpoint(tmp_path / "runs/exp/weights/last.pt").training
    assert training["gammas"].ndim == 2  # one value in the file however many epochs
    assert TrainState.from_dict(training, "last.pt").gammas == training["gammas"].tolist() != []
