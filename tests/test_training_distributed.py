"""Two processes under torchrun on gloo: their averaged gradients, and a whole training whose checkpoint one process takes up."""
from __future__ import annotations

import csv
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import picture_split, tiny_model, train_flags
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from utils.checkpoint import load_checkpoint
from utils.config import TrainConfig
from utils.data.loader import EpochBatches
from utils.device import compute_dtype, full_float32, precision_name, select_device
from utils.distributed import World, join_world
from utils.errors import UserError
from utils.files import ROOT
from utils.hyp import Hyp
from utils.network import to_input
from utils.training.distill import build_distillation
from utils.training.fit import Training
from utils.training.runs import Run
from utils.training.state import TrainState

CPU = torch.device("cpu")
IMAGES = 7  # odd: the last batch is filled up, so that both processes get as many


def new_training(folder: Path, world: World, taught: bool = False) -> Training:
    """With a teacher, wider than the network, there are adapters too: they start otherwise in each process."""
    folder.mkdir(exist_ok=True)
    split = picture_split(folder, [(64, 64), (64, 48), (48, 64), (64, 64), (64, 32), (64, 64), (48, 48)])
    config = TrainConfig(imgsz=64, batch_size=4, workers=0, precision="fp32", cache="none", teacher=("teacher.pt",), distill_features=1.0)
    teacher, model = tiny_model(folder, seed=1, width=16), tiny_model(folder)
    torch.manual_seed(world.rank)
    distillation = build_distillation(model, [teacher], config, CPU) if taught else None
    return Training(model, Run(config, Hyp(), folder), split, split, CPU, world, distillation)


def learner(training: Training) -> nn.Module:
    return training.distillation or training.model


def gathered(training: Training) -> dict[str, Tensor]:
    """The gradients of an epoch of two batches, gathered and not yet used."""
    training.stepper.backward = lambda loss, settings, images: loss.backward()
    training.stepper.step, training.stepper.moves_next = lambda: None, lambda settings: False
    training.train_one_epoch(0)
    return {key: p.grad for key, p in learner(training).named_parameters()}


def in_each_process(folder: Path) -> None:
    """What torchrun starts: this file as a script."""
    torch.set_num_threads(1)
    with join_world(CPU) as world:
        assert world.size == 2 and world.share(f"from {world.rank}") == "from 0" and world.gather(world.rank) == [0, 1]
        found, averaged = [], []
        for taught in (False, True):
            training = new_training(folder / f"rank{world.rank}", world, taught)
            training.network.register_comm_hook(None, lambda _, bucket: averaged.append(bucket.index()) or allreduce_hook(None, bucket))
            found.append(gathered(training))
        assert averaged == [0, 0], "once for each step, however many batches it gathers"
        torch.save(found, folder / f"gradients{world.rank}.pt")


def torchrun(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_a_single_process_has_no_group() -> None:
    with join_world(CPU) as world:
        assert world == World(0, 1) and world.share("own") == "own"
        model = torch.nn.Linear(1, 1)
        assert world.wrap(model, CPU, sync_bn=True) is model


def test_after_an_error_no_process_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    with pytest.raises(UserError), join_world(CPU):
        raise UserError("out of memory, here alone")
    assert not left
    with join_world(CPU) as world:
        assert world == World(1, 2)
    assert left


@pytest.mark.parametrize(("name", "capability", "expected"), [
    ("NVIDIA H200", (9, 0), torch.bfloat16), ("Tesla T4", (7, 5), torch.float16), ("NVIDIA GeForce RTX 2060", (7, 5), torch.float16),
    ("NVIDIA GeForce GTX 1650", (7, 5), torch.float32), ("NVIDIA T1000 8GB", (7, 5), torch.float32),
    ("NVIDIA GeForce GTX 1080", (6, 1), torch.float32)])  # fmt: skip
def test_automatic_precision_of_a_gpu(name: str, capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert compute_dtype("auto", torch.device("cuda", 0)) == expected
    assert compute_dtype("fp16", torch.device("cuda", 0)) == torch.float16
    assert precision_name(torch.device("cuda", 0), torch.float32) == ("fp32 (TF32 convolutions)" if capability >= (8, 0) else "fp32")
    with full_float32():
        assert precision_name(torch.device("cuda", 0), torch.float32) == "fp32"


def test_a_run_goes_on_in_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device where auto is fp16: no fused step beside its scaler, which the run had no need of so far."""
    before = new_training(tmp_path / "before", World())
    before._save()
    state = TrainState.from_dict(load_checkpoint(tmp_path / "before" / "weights" / "last.pt").training, "last.pt")
    monkeypatch.setattr("utils.training.fit.compute_dtype", lambda *_: torch.float16)
    after = new_training(tmp_path / "after", World())
    after._restore(state)
    assert after.stepper.scaler.is_enabled() and state.scaler == {}
    fused = [{group["fused"] for group in training.stepper.optimizer.param_groups} for training in (before, after)]
    assert fused == [{True}, {False}]


def test_sync_bn_needs_cuda() -> None:
    with pytest.raises(UserError, match="--sync-bn needs CUDA"):
        World(0, 2).wrap(torch.nn.BatchNorm2d(2), CPU, sync_bn=True)


def test_sync_bn_keeps_activations_or_refuses() -> None:
    """A norm that is its activation, too, as timm's are."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(2)
            self.act = nn.ReLU()

    with pytest.raises(UserError, match="--sync-bn: this backbone's norms compute its activations too"):
        World(0, 2).wrap(nn.Sequential(NormAct()), torch.device("cuda"), sync_bn=True)


def test_a_rectangular_batch_is_filled_up_with_its_own_kind() -> None:
    """7 images in batches of 4: the last batch's filler has the last batch's shape."""
    of_rank = [list(EpochBatches(np.arange(7), 4, shuffle="batches", rank=rank, world=2)) for rank in (0, 1)]
    last = [batch for batches in of_rank for batch in batches if (0, 0) not in batch and (0, 1) not in batch]
    assert sorted(index for batch in last for _, index in batch) == [4, 5, 6, 6]


def test_the_first_process_goes_first() -> None:
    calls: list[str] = []

    class Told(World):
        def share(self, value: object) -> object:
            calls.append("told")
            return value

    for rank in (0, 1):
        assert Told(rank, 2).first_alone(lambda: calls.append("made") or "own") == "own"
    assert calls == ["made", "told", "told", "made"]


@pytest.mark.parametrize(("asked", "rank", "processes", "expected"), [
    ("", 1, 2, 1), ("0,1", 1, 2, 1), ("1,0", 1, 2, 0), ("", 0, 1, 0), ("1", 0, 1, 1), ("0", 1, 2, "names 1 for 2 processes"),
    ("0, 1", 1, 2, 1), ("mps", 0, 1, "Apple's GPUs are not supported"), ("0,1", 0, 1, "torchrun --nproc_per_node 2")])  # fmt: skip
def test_each_process_has_a_gpu_of_its_own(asked: str, rank: int, processes: int, expected: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", str(rank)), monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if isinstance(expected, int):
        assert select_device(asked) == torch.device("cuda", expected)
    else:
        with pytest.raises(UserError, match=expected):
            select_device(asked)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_gradients_equal_those_computed_shard_by_shard(tmp_path: Path) -> None:
    done = torchrun(__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr
    of_ranks = [torch.load(tmp_path / f"gradients{rank}.pt") for rank in (0, 1)]
    for taught, first, second in zip((False, True), *of_ranks, strict=True):
        training = new_training(tmp_path / "alone", World(), taught)
        training.model.train()
        for rank in (0, 1):
            training.batches.rank, training.batches.world = rank, 2
            for batch in training.train_loader:
                training.objective(learner(training)(to_input(batch.images, CPU)), batch.targets).total.backward()
        assert taught == any(key.startswith("adapters.") for key in first)
        for key, parameter in learner(training).named_parameters():
            torch.testing.assert_close(first[key], parameter.grad, rtol=1e-5, atol=1e-5)
            assert torch.equal(first[key], second[key]) and first[key].any()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_torchrun_trains_and_one_process_goes_on(tmp_path: Path) -> None:
    flags = train_flags(tmp_path)
    done = torchrun("train.py", *flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "exp"
    assert [p.name for p in run.parent.iterdir()] == ["exp"], "the processes share one folder"
    assert done.stdout.count("weights: random") == 1 and done.stdout.count("next:") == 1, "one of them speaks"
    with open(run / "results.csv", newline="") as file:
        before = list(csv.DictReader(file))
    assert [row["epoch"] for row in before] == ["0", "1"]
    state = load_checkpoint(run / "weights" / "last.pt").training
    assert state["finished"] and state["step"] == 4 and not [key for key in state["model"] if key.startswith("module.")]

    assert train.main(["--resume", str(run / "weights" / "last.pt"), "--epochs", "3"]) == 0
    with open(run / "results.csv", newline="") as file:
        assert list(csv.DictReader(file))[:2] == before
    assert load_checkpoint(run / "weights" / "last.pt").training["step"] == 6


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
