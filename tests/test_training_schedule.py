"""Learning rates, parameter groups, accumulation and the averaged weights: numbers worked by hand."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import nn

from utils.hyp import Hyp
from utils.training.ema import ModelEma
from utils.training.optim import apply_step, build_optimizer
from utils.training.schedule import StepSettings, decay, progress, settings, warmup_steps
from utils.training.stepper import Stepper

HYP = Hyp()
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("epoch", "cosine", "expected"),
    [(0, False, 1), (100, False, 0.01), (50, False, 0.505), (0, True, 1), (100, True, 0.01), (50, True, 0.505),
     (25, False, 0.7525), (25, True, 0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)],
)  # fmt: skip
def test_decay_by_hand(epoch: int, cosine: bool, expected: float) -> None:
    assert decay(epoch / 100, 0.01, cosine) == pytest.approx(expected)


def test_progress_is_of_epochs_or_of_time_whichever_is_nearer_its_end() -> None:
    assert progress(25, 100, 9999, 0) == 0.25
    assert progress(25, 100, 30, 60) == 0.5 and progress(25, 100, 6, 60) == 0.25
    assert progress(25, 100, 70, 60) == 1  # an epoch that outlasted the limit


def test_warmup_lasts_three_epochs_and_at_least_a_hundred_steps() -> None:
    assert warmup_steps(HYP, 50) == 150
    assert warmup_steps(HYP, 10) == 100
    assert warmup_steps(Hyp(warmup_epochs=0), 50) == 0
    assert (warmup_steps(Hyp(warmup_epochs=1), 13), warmup_steps(Hyp(warmup_epochs=1), 50)) == (33, 50)  # a short one is short on few images


def test_settings_by_hand() -> None:
    """Batch 16: four batches make the nominal 64. lr0 0.01, bias from 0.1, momentum 0.8 to 0.937."""
    at = lambda step, epoch, batch=16: settings(step, epoch / 100, 200, batch, HYP, False)  # noqa: E731
    assert at(0, 0) == (0, 0.1, 0.8, 1)
    half = at(100, 0)
    assert half == pytest.approx((0.005, 0.055, 0.8685, 2))  # accumulate round(1 + 3 / 2), to even
    late = at(150, 1)
    lr = 0.01 * (1 - 0.0099)
    assert late == pytest.approx((lr * 0.75, 0.1 + (lr - 0.1) * 0.75, 0.8 + 0.137 * 0.75, 3))
    assert at(200, 2) == pytest.approx((0.01 * 0.9802, 0.01 * 0.9802, 0.937, 4))
    assert at(10_000, 99) == pytest.approx((0.01 * (0.01 + 0.99 * 0.01),) * 2 + (0.937, 4))
    assert at(50, 0, 4).accumulate == 5  # of 16 in the end: 1 + 15 / 4, rounded
    assert [at(10_000, 9, batch).accumulate for batch in (1, 24, 48, 64, 100)] == [64, 3, 1, 1, 1]
    assert settings(0, 0, 0, 16, HYP, False) == pytest.approx((0.01, 0.01, 0.937, 4))  # no warm-up


def test_groups_only_weights_decay(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    biases, weights, others = build_optimizer(model, "SGD", HYP, 64).param_groups
    own = dict(model.named_parameters())
    assert set(biases["params"]) == {p for key, p in own.items() if key.endswith("bias")}
    assert set(weights["params"]) == {m.weight for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert set(others["params"]) == {m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert sum(len(g["params"]) for g in (biases, weights, others)) == len(own)
    assert (biases["weight_decay"], weights["weight_decay"], others["weight_decay"]) == (0, 5e-4, 0)


@pytest.mark.parametrize(("batch", "expected"), [(16, 5e-4), (64, 5e-4), (128, 1e-3), (48, 5e-4 * 48 / 64), (24, 5e-4 * 72 / 64), (1, 5e-4)])
def test_decay_scales_with_what_accumulation_reaches(tmp_path: Path, batch: int, expected: float) -> None:
    assert build_optimizer(tiny_model(tmp_path), "SGD", HYP, batch).param_groups[1]["weight_decay"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_apply_step(tmp_path: Path, name: str) -> None:
    optimizer = build_optimizer(tiny_model(tmp_path), name, HYP, 16)
    assert type(optimizer).__name__ == name
    apply_step(optimizer, StepSettings(0.002, 0.05, 0.9, 1))
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.002, 0.002]
    assert all((g["momentum"] if name == "SGD" else g["betas"][0]) == 0.9 for g in optimizer.param_groups)
    assert name != "SGD" or all(g["nesterov"] for g in optimizer.param_groups)


def test_ema_follows_its_formula() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = ModelEma(model, decay=0.9, ramp=10)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 6):
        new = {k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v + n for k, v in model.state_dict().items()}
        model.load_state_dict(new)
        ema.update(model)
        d = 0.9 * (1 - math.exp(-n / 10))
        expected = {k: d * v + (1 - d) * new[k] if v.is_floating_point() else new[k] for k, v in expected.items()}
    assert ema.updates == 5
    torch.testing.assert_close(dict(ema.model.state_dict()), expected)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_ema_defaults_follow_fast_at_first() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ModelEma(model)
    nn.init.ones_(model.weight)
    ema.update(model)
    assert ema.model.weight.item() == pytest.approx(1 - 0.9999 * (1 - math.exp(-1 / 2000)))


def plain_stepper(accumulate: int, lr: float = 0.5) -> tuple[nn.Linear, Stepper, StepSettings]:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    stepper = Stepper(model, torch.optim.SGD([{"params": []}, {"params": model.parameters()}], lr), ModelEma(model), CPU, torch.float32)
    return model, stepper, StepSettings(lr, lr, 0.0, accumulate)


def test_stepper_accumulates_sums_and_steps() -> None:
    model, stepper, step = plain_stepper(accumulate=3)
    for n in range(3):
        assert model.weight.item() == 0 and stepper.ema.updates == 0
        stepper.backward(model(torch.tensor([[float(n)]])).sum(), step, 1)  # gradients 0, 1, 2
    assert model.weight.item() == pytest.approx(-0.5 * 3) and stepper.ema.updates == 1


def test_stepper_flushes_once_and_clips() -> None:
    model, stepper, step = plain_stepper(accumulate=9)
    stepper.backward(model(torch.tensor([[1000.0]])).sum(), step, 1)
    stepper.step()
    stepper.step()  # nothing gathered: nothing happens
    assert model.weight.item() == pytest.approx(-0.5 * 10, rel=1e-4), "the gradient's norm is cut to 10"
    assert stepper.ema.updates == 1 and model.weight.grad is None


def test_a_penalty_is_for_the_images_that_a_step_gathered() -> None:
    """During warm-up these are fewer than later, and an epoch's last are fewer too."""
    model, stepper, step = plain_stepper(accumulate=3)
    asked: list[int] = []
    stepper.penalty = asked.append
    for images, accumulate in ((4, 1), (4, 3), (4, 3), (4, 3), (4, 3), (2, 3)):
        stepper.backward(model(torch.ones(1, 1)).sum(), step._replace(accumulate=accumulate), images)
    stepper.step()
    assert asked == [4, 12, 6]
