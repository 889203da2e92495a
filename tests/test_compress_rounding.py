"""Rounding as int8 files round: numbers by hand, gradients that pass through, ranges, and a network that computes so."""
from __future__ import annotations

import torch
from channels import Net, conv
from tiny import lively, tiny_model
from torch import Tensor, nn

from utils.compress.rounding import Range, measure_ranges, round_input, round_weight, rounded, rounded_weight, weighted_layers

# --- values --------------------------------------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    weight = torch.tensor([[[[4.0, -1.1, 0.4]]], [[[0.04, 0.011, -0.02]]]])  # steps of 1 and 0.01
    expected = torch.tensor([[[[4.0, -1.0, 0.0]]], [[[0.04, 0.01, -0.02]]]])
    torch.testing.assert_close(round_weight(weight, 4), expected)
    torch.testing.assert_close(round_weight(weight.transpose(0, 1), 4, axis=1), expected.transpose(0, 1))
    assert torch.equal(round_weight(torch.zeros(2, 1, 1, 1), 64), torch.zeros(2, 1, 1, 1))


def test_weights_are_whole_numbers_of_7_bits():
    """By an independent formula, and as PyTorch's own operator for int8 weights has them."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    step = weight.flatten(1).abs().amax(1) / 64
    whole = round_weight(weight) / step.view(-1, 1, 1, 1)
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert [int(channel.abs().max().round()) for channel in whole] == [64] * 6
    torch.testing.assert_close(round_weight(weight), torch.round(weight / step.view(-1, 1, 1, 1)) * step.view(-1, 1, 1, 1))
    theirs = torch.fake_quantize_per_channel_affine(weight, step, torch.zeros(6, dtype=torch.int32), 0, -128, 127)
    torch.testing.assert_close(round_weight(weight), theirs)


def test_inputs_by_hand():
    low, high = torch.tensor(-1.0), torch.tensor(1.55)  # 255 steps of 0.01, the hundredth is 0
    x = torch.tensor([-1.0, 1.55, 0.0, 0.004, 0.006, -0.016, 7.0, -7.0])
    torch.testing.assert_close(round_input(x, low, high), torch.tensor([-1.0, 1.55, 0.0, 0.0, 0.01, -0.02, 1.55, -1.0]))
    assert float(round_input(torch.tensor(0.0), torch.tensor(3.0), torch.tensor(5.1))) == 0  # 0 is always a level: what pads must stay 0
    assert torch.equal(round_input(torch.zeros(3), torch.tensor(0.0), torch.tensor(0.0)), torch.zeros(3))
    assert round_input(x.bfloat16(), low, high).dtype == torch.float32


def test_inputs_are_256_values():
    x = torch.linspace(-0.7, 2.1, 5000)
    found = round_input(x, x[0], x[-1])
    step = 2.8 / 255
    zero = round(0.7 / step)
    torch.testing.assert_close(found, ((x / step + zero).round().clamp(0, 255) - zero) * step, rtol=0, atol=1e-6)
    assert len(found.unique()) == 256 and (found == 0).any()


# --- gradients -----------------------------------------------------------------------------------------------------------------------------


def test_gradients_pass_through_weights():
    weight = torch.randn(3, 2, 1, 1, requires_grad=True)
    wanted = torch.randn(3, 2, 1, 1)
    (round_weight(weight) * wanted).sum().backward()
    assert torch.equal(weight.grad, wanted)


def test_gradients_pass_through_inputs_within_the_range():
    x = torch.tensor([-1.5, -0.9, 0.0, 0.3, 1.5, 1.7], requires_grad=True)
    wanted = torch.tensor([1.0, 2, 3, 4, 5, 6])
    (round_input(x, torch.tensor(-1.0), torch.tensor(1.55)) * wanted).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


def test_a_layers_gradient_is_that_of_its_rounded_weights():
    layer, x = conv(3, 4, 3), torch.rand(2, 3, 8, 8)
    rounded_weight(layer)
    y = nn.functional.conv2d(x, rounded_weight(layer), layer.bias, padding=1)
    y.square().sum().backward()
    leaf = round_weight(layer.weight.detach()).requires_grad_()
    nn.functional.conv2d(x, leaf, layer.bias.detach(), padding=1).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, leaf.grad)


# --- a network -----------------------------------------------------------------------------------------------------------------------------


def test_ranges_by_hand():
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.first(x)
        return net.twice(y) + net.twice(y - 10)

    net = Net(forward, first=conv(3, 2), twice=conv(2, 2), idle=conv(2, 2), linear=nn.Linear(2, 2))
    nn.init.constant_(net.first.weight, 1.0)
    nn.init.zeros_(net.first.bias)
    ranges = measure_ranges(net, [torch.full((1, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.25)])
    assert {name: (float(seen.low), float(seen.high)) for name, seen in ranges.items()} == {"first": (0.25, 0.5), "twice": (0.75 - 10, 1.5)}
    assert measure_ranges(net, []) == {}
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_network_that_computes_so():
    """Against each layer by hand; a transposed convolution's output channels are its second axis."""
    net = Net(lambda net, x: net.last(net.up(net.first(x)).movedim(1, -1)), first=conv(3, 4), up=nn.ConvTranspose2d(4, 5, 2, 2), last=nn.Linear(5, 2))
    x = torch.rand(2, 3, 8, 8)
    ranges = measure_ranges(net, [x])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    copy = rounded(net, ranges)
    with torch.no_grad():
        y = nn.functional.conv2d(round_input(x, *ranges["first"]), round_weight(net.first.weight), net.first.bias)
        y = nn.functional.conv_transpose2d(round_input(y, *ranges["up"]), round_weight(net.up.weight, axis=1), net.up.bias, 2).movedim(1, -1)
        y = nn.functional.linear(round_input(y, *ranges["last"]), round_weight(net.last.weight), net.last.bias)
        torch.testing.assert_close(copy(x), y)
        assert not torch.allclose(net(x), y, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_layers_without_a_range_stay_float(tmp_path):
    network = lively(tiny_model(tmp_path, width=16))
    images = torch.rand(2, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(rounded(network, {})(images), network(images), strict=True))
    some = {"model.0.conv": Range(torch.tensor(0.0), torch.tensor(1.0))}
    before, after = weighted_layers(network), weighted_layers(rounded(network, some))
    assert [name for name in before if not torch.equal(before[name].weight, after[name].weight)] == list(some)
