"""Re-estimated statistics against the mean of batch statistics, worked out apart."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.compress.norms import reestimate_norms


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.03), nn.ReLU(), nn.Dropout(0.9), nn.Conv2d(4, 2, 1),
                         nn.BatchNorm2d(2, momentum=None)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(count, 3, 8, 8, generator=generator) * (count + 1) for count in (4, 1, 3)]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) mean and variance of (B, C, H, W), by their definitions."""
    values = x.double().movedim(1, 0).flatten(1)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().sum(1) / (values.shape[1] - 1)


@torch.no_grad()
def test_statistics_are_the_mean_over_batches():
    model = network()
    first, second = model[1], model[5]
    for norm in (first, second):
        norm.running_mean.fill_(7)
        norm.running_var.fill_(9)
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    seen: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
    for images in batches():
        x = model[0](images)
        mean, variance = statistics(x)
        count = x.numel() / x.shape[1]  # the second norm sees what the first makes of this batch's own, biased, statistics
        shape = (1, -1, 1, 1)
        scale = (variance * (count - 1) / count + first.eps).rsqrt() * first.weight
        y = (x.double() - mean.view(shape)) * scale.view(shape) + first.bias.view(shape)
        seen.append(((mean, variance), statistics(model[4](y.relu().float()))))
    reestimate_norms(model, batches())
    for n, norm in enumerate((first, second)):
        for found, part in ((norm.running_mean, 0), (norm.running_var, 1)):
            wanted = torch.stack([of_batch[n][part] for of_batch in seen]).mean(0)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_else_changes():
    model = network()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items() if "running" not in key and "tracked" not in key}
    reestimate_norms(model, batches())
    assert not any(module.training for module in model.modules())
    assert (model[1].momentum, model[5].momentum) == (0.03, None)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in weights.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_twice_is_once():
    once, twice = network(), network()
    for model, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            reestimate_norms(model, batches())
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


def test_norms_without_statistics_and_networks_without_norms_stay():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)).eval()
    images = torch.rand(2, 3, 4, 4)
    before = model(images)
    reestimate_norms(model, batches())
    assert torch.equal(model(images), before)
