"""Training and validation on a CUDA device: the CPU's numbers within tolerance, mixed precision, pinned batches."""
from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import picture_split, tiny_model, train_flags

import train
import val
from utils.checkpoint import load_checkpoint
from utils.data.dataset import Batch, TrainDataset, scaled_sizes
from utils.data.imagecache import ImageCache
from utils.data.loader import EpochBatches, make_loader
from utils.device import autocast
from utils.distributed import World
from utils.hyp import Hyp
from utils.network import to_input
from utils.training.ema import ModelEma
from utils.training.loss import DetectionLoss
from utils.training.memory import fit_batch
from utils.training.optim import build_optimizer, load_optimizer
from utils.training.schedule import StepSettings
from utils.training.stepper import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
STEP = StepSettings(0.01, 0.01, 0.9, 1)


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Full float32: TensorFloat-32 would hide what is compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def some_batch(folder: Path, pin: bool = False, workers: int = 0) -> Batch:
    split = picture_split(folder, [(64, 64)] * 6)
    dataset = TrainDataset(split, 64, Hyp(), ImageCache(scaled_sizes(split, 64), "ram", 2**30))
    return next(iter(make_loader(dataset, EpochBatches(np.arange(6), 6), workers, pin)))


def loss_and_gradients(folder: Path, batch: Batch, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict]:
    model = tiny_model(folder).to(device, memory_format=torch.channels_last)
    with autocast(device, dtype):
        maps = model(to_input(batch.images, device))
    loss = DetectionLoss(model.head.anchors, 2, Hyp(), 64)(maps, batch.targets.to(device))
    loss.total.backward()
    return loss.parts.cpu(), {key: p.grad.cpu() for key, p in model.named_parameters()}


def test_loss_and_gradients_equal_the_cpus(tmp_path: Path) -> None:
    batch = some_batch(tmp_path)
    (cpu, cpu_grads), (cuda, cuda_grads) = (loss_and_gradients(tmp_path, batch, device) for device in (CPU, CUDA))
    torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-6)
    for key in cpu_grads:
        torch.testing.assert_close(cuda_grads[key], cpu_grads[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_near(tmp_path: Path, dtype: torch.dtype) -> None:
    batch = some_batch(tmp_path)
    parts, gradients = loss_and_gradients(tmp_path, batch, CUDA, dtype)
    expected, _ = loss_and_gradients(tmp_path, batch, CUDA)
    torch.testing.assert_close(parts, expected, rtol=0.03, atol=1e-4)
    assert parts.dtype == torch.float32 and all(g.isfinite().all() for g in gradients.values())


def test_batches_are_pinned(tmp_path: Path) -> None:
    for workers in (0, 2):
        batch = some_batch(tmp_path, pin=True, workers=workers)
        assert isinstance(batch, Batch) and batch.images.is_pinned() and batch.targets.is_pinned()
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        on_device = to_input(batch.images, CUDA)
        assert on_device.is_cuda and on_device.is_contiguous(memory_format=torch.channels_last) and on_device.max() <= 1


def test_fp16_steps_scale_their_gradients(tmp_path: Path) -> None:
    """A gradient that is not finite skips the step and halves the scale; the next one moves the weights."""
    model = tiny_model(tmp_path).to(CUDA)
    stepper = Stepper(model, build_optimizer(model, "SGD", Hyp(), 64, fused=False), ModelEma(model), CUDA, torch.float16)
    weight, scale = model.model[0].conv.weight, stepper.scaler.get_scale()
    before = weight.detach().clone()
    stepper.backward(weight.sum() * float("inf"), STEP, 1)
    assert torch.equal(weight, before) and stepper.scaler.get_scale() == scale / 2
    stepper.backward(weight.sum(), STEP, 1)
    assert not torch.equal(weight, before) and weight.isfinite().all()


def test_ema_equals_the_cpus(tmp_path: Path) -> None:
    models = [tiny_model(tmp_path).to(device) for device in (CPU, CUDA)]
    emas = [ModelEma(model) for model in models]
    for n in range(3):
        for model, ema in zip(models, emas, strict=True):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1 * n)
            ema.update(model)
    for a, b in zip(emas[0].model.state_dict().values(), emas[1].model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.cpu())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_saved_optimizer_goes_on_alike(tmp_path: Path, name: str) -> None:
    """Its state comes back from a file in plain memory order; the network's weights lie channels last."""
    models = [tiny_model(tmp_path).to(CUDA, memory_format=torch.channels_last) for _ in range(2)]
    optimizers = [build_optimizer(model, name, Hyp(), 64) for model in models]
    for n in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(n)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, device=CUDA).to(memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
            optimizer.step()
        state = optimizers[1].state_dict()
        state["state"] = {k: {s: v.contiguous() if torch.is_tensor(v) else v for s, v in slots.items()} for k, slots in state["state"].items()}
        load_optimizer(optimizers[1], state)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_batch_that_fits_the_device(tmp_path: Path) -> None:
    model = tiny_model(tmp_path).to(CUDA)
    assert fit_batch(model, -1, 64, CUDA, World(), images=20).batch_size == 20


@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
def test_train_resume_and_validate(tmp_path: Path, precision: str) -> None:
    flags = [*train_flags(tmp_path), "--device", "0", "--precision", precision, "--workers", "2"]
    assert train.main(flags) == 0
    run = tmp_path / "runs" / "exp"
    last = run / "weights" / "last.pt"
    state = load_checkpoint(last).training
    assert state["ema_updates"] == 4 and bool(state["scaler"]) == (precision == "fp16")
    assert train.main(["--resume", str(last), "--epochs", "3"]) == 0
    with open(run / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(np.isfinite(float(row["train/box_loss"])) for row in rows)
    shown = ["--weights", str(run / "weights" / "best.pt"), "--data", flags[3], "--imgsz", "64", "--noplots", "--project", str(tmp_path / "val")]
    assert val.main([*shown, "--device", "0", *(["--half"] if precision == "fp16" else [])]) == 0


def test_training_follows_the_cpu(tmp_path: Path) -> None:
    """One epoch of two batches, float32: the losses agree."""
    flags, losses = [*train_flags(tmp_path), "--epochs", "1"], []
    for device in ("cpu", "0"):
        assert train.main([*flags, "--device", device, "--name", f"on-{device}"]) == 0
        with open(tmp_path / "runs" / f"on-{device}" / "results.csv", newline="") as file:
            losses.append([float(value) for key, value in next(csv.DictReader(file)).items() if key.startswith("train/")])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
