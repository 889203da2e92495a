"""The loop and what it leaves on disk: a run that was killed at any moment ends as if it had not been."""
from __future__ import annotations

import csv
import dataclasses
import math
import multiprocessing
import os
import re
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import model_yaml, tiny_model, train_flags

import train
from models.yolo import load_model
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.network import to_input
from utils.training import engine, fit
from utils.training.engine import random_resize, same_size
from utils.training.fit import image_chances, write_results
from utils.training.memory import StepMemory, fit_batch, step_memory
from utils.training.qat import QuantizationAware
from utils.training.state import TrainState, pack_rows, unpack_rows
from utils.training.stepper import Stepper

CPU = torch.device("cpu")
EPOCHS = 4
BATCHES = 2  # an epoch


@pytest.fixture(scope="module")
def rich(place: Path, flags: list[str]) -> list[str]:
    """With everything that has a memory of its own: the class scores, the image sizes, dropout's random stream, the schedule."""
    cfg = model_yaml(place, name="dropout.yaml", dropout=0.5)
    return [*flags, "--cfg", str(cfg), "--epochs", str(EPOCHS), "--image-weights", "--multi-scale", "--cos-lr",
            "--slim", "0.001", "--soft-prune", "sfp"]


@pytest.fixture(scope="module")
def whole(place: Path, rich: list[str]) -> Path:
    """A run that nothing interrupted."""
    torch.set_num_threads(1)
    assert train.main([*rich, "--name", "whole"]) == 0
    return place / "runs" / "whole"


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "time_s"} for row in csv.DictReader(file)]


def differing(a: object, b: object, place: str = "") -> list[str]:
    """Where two trees of tensors and plain data differ in a bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{place}: keys"]
        return [found for key in a for found in differing(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return differing(dict(enumerate(a)), dict(enumerate(b)), place)
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [place]


def assert_equal_runs(run: Path, expected: Path, ignored: tuple[str, ...] = ()) -> None:
    assert rows(run) == rows(expected)
    for name in ("last.pt", "best.pt"):
        mine, wanted = (dataclasses.asdict(load_checkpoint(folder / "weights" / name)) for folder in (run, expected))
        for checkpoint in (mine, wanted):
            if state := checkpoint["training"]:
                state["history"] = [{k: v for k, v in row.items() if k != "time_s"} for row in unpack_rows(state["history"])]
                del state["seconds"]
                for key in ("name", "resume", *ignored):
                    del state["config"][key]
        assert differing(mine, wanted) == []
    assert not list(run.glob("**/.*")), "nothing half-written is left"


# killed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_mid_epoch() -> None:
    """In the second of the third epoch's two batches."""
    backward, calls = Stepper.backward, []

    def counting(self: Stepper, *args: object) -> None:
        calls.append(1)
        if len(calls) == 2 * BATCHES + 2:
            die()
        backward(self, *args)

    Stepper.backward = counting


def with_half_of_last_written() -> None:
    write_bytes, calls = Path.write_bytes, []

    def half(self: Path, data: bytes) -> None:
        calls.append(self.name) if self.name.startswith(".last.") else None
        if len(calls) == 2:
            write_bytes(self, bytes(data)[: len(data) // 2])
            die()
        write_bytes(self, data)

    Path.write_bytes = half


def before_last_gets_its_name() -> None:
    replace, calls = os.replace, []

    def counting(source: Path, target: Path) -> None:
        calls.append(target) if Path(target).name == "last.pt" else None
        if len(calls) == 3:
            die()
        replace(source, target)

    os.replace = counting


def train_in_a_process(argv: list[str], arrange: Callable[[], None] | None = None) -> None:
    torch.set_num_threads(1)
    if arrange:
        arrange()
    sys.exit(train.main(argv))


def exit_code(*args: object) -> int:
    """Of a training in a process of its own, forked from a clean one that has PyTorch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "cv2", "matplotlib.pyplot", "torch.utils.tensorboard"])
    process = context.Process(target=train_in_a_process, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.parametrize("moment", [in_mid_epoch, with_half_of_last_written, before_last_gets_its_name], ids=lambda f: f.__name__)
def test_killed_and_resumed_equals_uninterrupted(rich: list[str], whole: Path, moment: Callable[[], None]) -> None:
    run = whole.with_name(moment.__name__)
    assert exit_code([*rich, "--name", run.name, "--workers", "1"], moment) == -signal.SIGKILL
    assert 0 < load_checkpoint(run / "weights" / "last.pt").training["epoch"] < EPOCHS
    assert (rows(run) != rows(whole)) and not load_checkpoint(run / "weights" / "last.pt").training["finished"]
    assert exit_code(["--resume", str(run / "weights" / "last.pt"), "--workers", "0"]) == 0
    assert_equal_runs(run, whole)


# interrupted in other ways, and going on


def interrupt_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    backward, calls = Stepper.backward, []

    def counting(self: Stepper, *args: object) -> None:
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        backward(self, *args)

    monkeypatch.setattr(Stepper, "backward", counting)


@pytest.mark.parametrize(
    "variant", [["--optimizer", "AdamW"], ["--rect", "--cache", "disk", "--optimizer", "Adam"], ["--noval", "--freeze", "2"]], ids="-".join
)
def test_interrupted_and_resumed_equals_uninterrupted(
    place: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], variant: list[str]
) -> None:
    name = "".join(variant).strip("-")
    argv = [*flags, *variant, "--epochs", "3", "--seed", "7"]
    assert train.main([*argv, "--name", f"{name}-whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, batch=4)
        assert train.main([*argv, "--name", name]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "interrupted" in error[0] and "--resume" in error[0]
    run = place / "runs" / name
    assert load_checkpoint(run / "weights" / "last.pt").training["epoch"] == 1
    (run / f".results.{uuid.uuid4().hex}.csv").write_text("half")
    assert train.main(["--resume", str(run / "weights" / "last.pt")]) == 0
    assert_equal_runs(run, place / "runs" / f"{name}-whole")


def test_more_epochs_extend_a_finished_run(place: Path, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "extended"
    assert train.main([*flags, "--epochs", "2", "--name", "extended"]) == 0
    before = rows(run)
    last = str(run / "weights" / "last.pt")
    assert train.main(["--resume", last]) == 2
    assert "finished after 2 epochs: give --epochs 4" in capfd.readouterr().err
    assert train.main(["--resume", last, "--epochs", "4"]) == 0
    assert f"{last}: 18 layers" in capfd.readouterr().out
    assert rows(run)[:2] == before and [row["epoch"] for row in rows(run)] == list("0123")
    assert float(rows(run)[3]["x/lr1"]) < float(rows(run)[2]["x/lr1"]) * 1.5  # of a schedule of four epochs
    assert "epochs: 4" in (run / "opt.yaml").read_text()


def test_newest_run_is_found(flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*flags, "--project", str(tmp_path / "runs"), "--epochs", "1"]
    for name in ("a", "b"):
        assert train.main([*argv, "--name", name]) == 0
    os.utime(tmp_path / "runs" / "a" / "weights" / "last.pt", (2e9, 2e9))
    assert train.main(["--resume", "--project", str(tmp_path / "runs"), "--epochs", "2"]) == 0
    assert len(rows(tmp_path / "runs" / "a")) == 2 and len(rows(tmp_path / "runs" / "b")) == 1
    capfd.readouterr()
    assert train.main(["--resume", "--project", str(tmp_path / "none")]) == 2
    assert "no weights/last.pt below" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--batch-size", "8"], "leave out --batch-size"), (["--imgsz", "96"], "leave out --imgsz"), (["--data", "x.yaml"], "leave out --data")],
)
def test_resume_refuses_what_would_make_it_another_run(whole: Path, capfd: pytest.CaptureFixture[str], extra: list[str], message: str) -> None:
    before = (whole / "weights" / "last.pt").read_bytes()
    assert train.main(["--resume", str(whole / "weights" / "last.pt"), "--epochs", "9", *extra]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert (whole / "weights" / "last.pt").read_bytes() == before


def test_resume_refuses_other_files(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(path: Path) -> str:
        assert train.main(["--resume", str(path)]) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    assert "no training state" in refused(whole / "weights" / "best.pt")
    assert "no such" in refused(tmp_path / "last.pt")
    checkpoint = load_checkpoint(whole / "weights" / "last.pt")
    (tmp_path / "cut.pt").write_bytes((whole / "weights" / "last.pt").read_bytes()[:2000])
    assert "cut.pt" in refused(tmp_path / "cut.pt")
    for change in ({"unknown": 1}, {"config": {"unknown": 1}}):
        save_checkpoint(tmp_path / "other.pt", dataclasses.replace(checkpoint, training=checkpoint.training | change))
        assert "another version" in refused(tmp_path / "other.pt")
    config = checkpoint.training["config"]
    for value in ([], 5, None):
        save_checkpoint(tmp_path / "other.pt", dataclasses.replace(checkpoint, training=checkpoint.training | {"config": value}))
        assert "another version" in refused(tmp_path / "other.pt")
    for name, value in (("epochs", "5"), ("imgsz", 0), ("optimizer", "Lion"), ("freeze", (0, -1)), ("freeze", ()), ("freeze", (1.5,)), ("rect", 1),
                        ("teacher", (5,)), ("epochs", torch.ones(2)), ("plugin", torch.ones(2)), ("epochs", 100.0)):
        save_checkpoint(tmp_path / "other.pt", dataclasses.replace(checkpoint, training=checkpoint.training | {"config": config | {name: value}}))
        assert f"other.pt: its --{name} " in refused(tmp_path / "other.pt")


# what a run leaves


def test_checkpoints_of_a_run(whole: Path) -> None:
    last, best = (load_checkpoint(whole / "weights" / name) for name in ("last.pt", "best.pt"))
    assert isinstance(last, Checkpoint) and last.names == best.names == ("red", "green") and last.imgsz == 64
    assert best.training is None and last.training["finished"] and last.training["epoch"] == EPOCHS and last.training["step"] == BATCHES * EPOCHS
    assert {v.dtype for v in best.state_dict.values() if v.is_floating_point()} == {torch.float16}
    assert {v.dtype for v in last.state_dict.values() if v.is_floating_point()} == {torch.float32}
    assert (whole / "weights" / "best.pt").stat().st_size < (whole / "weights" / "last.pt").stat().st_size / 3
    raw, averaged = last.training["model"], last.state_dict
    assert any(not torch.equal(raw[key], averaged[key]) for key in raw), "the averaged weights are the checkpoint's own"
    best_row = rows(whole)[last.training["best_epoch"]]
    assert float(best_row["metrics/mAP_0.5:0.95"]) == pytest.approx(best.metrics["mAP50-95"], abs=1e-6)
    fitness = [0.1 * float(r["metrics/mAP_0.5"]) + 0.9 * float(r["metrics/mAP_0.5:0.95"]) for r in rows(whole)]
    assert last.training["best_fitness"] == pytest.approx(max(fitness), abs=1e-6) and np.argmax(fitness) == last.training["best_epoch"]


def test_results_csv(whole: Path) -> None:
    table = rows(whole)
    assert len(table) == EPOCHS
    assert list(table[0]) == ["epoch", *(f"{p}/{n}_loss" for p in ("train", "val") for n in ("box", "obj", "cls")),
                              *(f"metrics/{n}" for n in ("precision", "recall", "f1", "mAP_0.5", "mAP_0.5:0.95")), "x/lr0", "x/lr1", "x/lr2",
                              "slim/near_zero"], "YOLOv5's names, and what else there is to say"
    assert all(np.isfinite(float(value)) for row in table for value in row.values())
    for epoch, row in enumerate(table):  # of each epoch's last batch, in a warm-up of a hundred batches
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        assert float(row["x/lr1"]) == float(row["x/lr2"]) == pytest.approx(0.01 * cosine * (BATCHES * epoch + BATCHES - 1) / 100, rel=1e-4)


def test_write_results_of_rows_with_other_columns(tmp_path: Path) -> None:
    write_results(tmp_path / "r.csv", [{"epoch": 0, "a": 0.5}, {"epoch": 1, "a": 1 / 3, "b": 2.0}])
    assert (tmp_path / "r.csv").read_text().splitlines() == ["epoch,a,b", "0,0.5,", "1,0.333333,2"]
    write_results(tmp_path / "r.csv", [{"epoch": 0, "a": math.nan, "b": 2.0}])
    assert (tmp_path / "r.csv").read_text().splitlines() == ["epoch,a,b", "0,,2"], "as after a resume"
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]


def test_every_epoch_shows_other_pictures(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recording(images: torch.Tensor, device: torch.device) -> torch.Tensor:
        seen.append(images.numpy().tobytes())
        return to_input(images, device)

    monkeypatch.setattr(engine, "to_input", recording)
    assert train.main([*flags, "--epochs", "3", "--noval", "--name", "other"]) == 0
    assert len(seen) == len(set(seen)) == 3 * BATCHES


# the pieces around the loop


def test_multi_scale_sizes() -> None:
    images, sizes = torch.rand(2, 3, 64, 96), set()
    for n in range(40):
        resized = random_resize(96, 32, seed=0, epoch=1)(n, images)
        assert torch.equal(resized, random_resize(96, 32, seed=0, epoch=1)(n, images)), "every process and a resumed run take the same"
        height, width = resized.shape[2:]
        assert height % 32 == width % 32 == 0 and 32 <= width <= 160 and height <= width
        sizes.add(width)
    assert sizes == {32, 64, 96, 128, 160}, "0.5 to 1.5 times 96, in whole strides"
    assert same_size(0, images) is images


def test_no_patience_is_lost_before_anything_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And best.pt is the latest network until then."""
    scores = iter([0.0] * 4 + [0.5, 0.2, 0.1, 0.1])
    monkeypatch.setattr(fit.ValResult, "fitness", property(lambda _: next(scores)))
    kept = []
    monkeypatch.setattr(fit.Training, "_save_best", lambda training: kept.append(training.state.epoch))
    monkeypatch.setattr(fit.Training, "report", lambda _: None)
    assert train.main([*train_flags(tmp_path), "--epochs", "20", "--patience", "2"]) == 0
    assert kept == [1, 2, 3, 4, 5] and len(list(scores)) == 1, "over two epochs after the best"


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The step that broke them was the epoch's last, of which no loss tells."""
    trained = fit.Training.train_one_epoch

    def broken(training: fit.Training, epoch: int, eta: str = "") -> Any:
        result = trained(training, epoch, eta)
        if epoch == 1:
            next(training.stepper.ema.model.parameters()).data[0] = math.nan
        return result

    monkeypatch.setattr(fit.Training, "train_one_epoch", broken)
    assert train.main([*train_flags(tmp_path), "--epochs", "3"]) == 2
    assert re.search(r"after epoch 2 1 tensors are not finite, model\.0\..*: lower lr0", capfd.readouterr().err)
    assert load_checkpoint(tmp_path / "runs" / "exp" / "weights" / "last.pt").training["epoch"] == 1


def test_one_image_of_one_pixel_is_too_little_for_norms(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main([*train_flags(tmp_path, train=5), "--imgsz", "32"]) == 2
    assert "error: batch norm needs more than 1 image of 32x32 px in a batch" in capfd.readouterr().err


def test_rows_that_nobody_reads_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two of them, one read by the other alone."""
    flags = train_flags(tmp_path)
    content = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    dead = [[0, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]]]
    rows = len(content["backbone"]) + len(content["head"]) - 1
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content | {"head": [*content["head"][:-1], *dead, content["head"][-1]]}))
    assert train.main(flags) == 0
    assert len(re.findall("nothing of it reaches Detect, so that it is not trained", capfd.readouterr().err)) == 2
    last = tmp_path / "runs" / "exp" / "weights" / "last.pt"
    assert [layer.row for layer in load_model(str(last)).unread_rows] == [rows, rows + 1]


def test_batch_that_fits_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    each = step_memory(model, 64, CPU).image
    assert 3 * each < step_memory(model, 128, CPU).image < 5 * each
    assert differing(before, dict(model.state_dict())) == [] and model.training
    maps = 8 * (32**2 + 16**2 + 8**2 + 4**2 + 2**2) * 4  # the convolutions' outputs, float32; batch norm and SiLU keep their own
    assert 2 * maps < each < 8 * maps
    alone, two = World(), World(0, 2)
    monkeypatch.setattr(World, "gather", lambda world, value: [value] * world.size)
    assert fit_batch(model, -1, 64, CPU, alone, images=10).batch_size == 10
    assert fit_batch(model, -1, 64, CPU, alone, images=100_000).batch_size == 512
    assert fit_batch(model, -1, 64, CPU, two, images=7).batch_size == 6 and fit_batch(model, -1, 64, CPU, two, images=1).batch_size == 2
    assert fit_batch(model, 16, 64, CPU, alone, images=10).batch_size == 16
    assert 8 * each < fit_batch(model, 16, 64, CPU, two, images=10).host_bytes < fit_batch(model, 16, 64, CPU, alone, images=10).host_bytes
    with pytest.raises(UserError, match=r"--batch-size 1000000 at 64 px needs about .* GB a process, .* use --batch-size \d+ or less"):
        fit_batch(model, 1_000_000, 64, CPU, alone, images=10)
    with pytest.raises(UserError, match="multiple of 2"):
        fit_batch(model, 5, 64, CPU, two, images=10)
    assert step_memory(model, 64, CPU, torch.bfloat16).image < 0.8 * each


def test_weights_are_no_part_of_an_image(tmp_path: Path) -> None:
    """What is kept of them counts once, however many images there are. Wide, so that they weigh."""
    wide = tiny_model(tmp_path, width=64)
    rounding = QuantizationAware.with_any_range(wide.folded())
    copied = sum(p.numel() for p in wide.parameters() if p.ndim > 1)
    plain, bf16, rounded = step_memory(wide, 64, CPU), step_memory(wide, 64, CPU, torch.bfloat16), step_memory(rounding, 64, CPU)
    assert plain.once < 0.05 * copied and bf16.once == pytest.approx(2 * copied, rel=0.02)
    assert rounded.once == pytest.approx(5 * copied, rel=0.02), "float32, and which lie beyond the range"
    assert bf16.image == pytest.approx(plain.image / 2, rel=0.02) and step_memory(wide, 128, CPU).image == pytest.approx(4 * plain.image, rel=0.02)
    seen = []
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda _, inputs: seen.extend(i.shape for i in inputs if torch.is_tensor(i))):
        large = step_memory(wide, 512, CPU, torch.bfloat16)
    assert large.once == bf16.once and large.image == pytest.approx(64 * bf16.image, rel=0.02)
    assert {shape[0] for shape in seen if shape[-1] == 512} == {2}, "no more of the large ones at once than norms want"


def test_image_chances():
    """By hand, and the same however many images like these there are."""
    empty, reds, green = np.zeros((0, 5)), np.zeros((3, 5)), np.array([[1.0, 0, 0, 0, 0]])
    split = SimpleNamespace(names=("red", "green"), boxes=[empty, reds, green])
    chances = image_chances(split, [0.5, 0])
    np.testing.assert_allclose(chances, np.array([0, 0.25, 1]) + 1e-3)  # 3 boxes of a third of (1 - 0.5)^2; 1 box of (1 - 0)^2
    many = image_chances(SimpleNamespace(names=split.names, boxes=split.boxes * 1000), [0.5, 0])
    np.testing.assert_allclose(many[:3] / many[0], chances / chances[0])
    assert image_chances(SimpleNamespace(names=split.names, boxes=[empty]), []).tolist() == [1e-3]


def test_a_gpu_is_given_the_benefit_of_the_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The estimate's allowance was measured on a CPU; out of memory is told in a line there, and kills the process here."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr("utils.training.memory.step_memory", lambda *_: StepMemory(0, 2**20))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**27, 2**27))
    model = tiny_model(tmp_path)
    assert fit_batch(model, 128, 64, cuda, World(), images=10) == (128, 0), "nothing of the machine's own memory"
    assert "use --batch-size 108 or less" in capsys.readouterr().err
    with pytest.raises(UserError, match="use --batch-size 108 or less"):
        fit_batch(model, 256, 64, cuda, World(), images=10)
    monkeypatch.setattr(World, "gather", lambda world, counts: [counts, tuple(count // 2 for count in counts)])  # another process has half of it
    with pytest.raises(UserError, match="use --batch-size 108 or less"):
        fit_batch(model, 256, 64, cuda, World(0, 2), images=10)
    assert fit_batch(model, -1, 64, cuda, World(0, 2), images=1000).batch_size == 108


def test_what_grows_with_the_epochs_is_saved_however_many_there_are(tmp_path: Path) -> None:
    plain = {f"x/{k}": 0.5 for k in range(15)}
    rows = [{"epoch": n, "train/box_loss": 0.1 * n} | ({"metrics/mAP_0.5": 1 / 3} if n % 2 else {}) | plain for n in range(9000)]
    state = TrainState({}, {}, history=rows)
    save_checkpoint(tmp_path / "last.pt", Checkpoint({}, (), {}, training=state.to_dict()))
    again = TrainState.from_dict(load_checkpoint(tmp_path / "last.pt").training, "last.pt").history
    assert again == rows and type(again[5]["epoch"]) is int
    assert unpack_rows(rows) == rows and unpack_rows(pack_rows([])) == []


@pytest.mark.parametrize("history", [{}, {"columns": ["epoch"]}, {"columns": ["epoch"], "values": [1]}, {"columns": [], "values": torch.zeros(1, 1)}])
def test_a_damaged_history_is_one_line(history: dict) -> None:
    with pytest.raises(UserError, match=r"^last\.pt: its training state is of another version: "):
        TrainState.from_dict({"config": {}, "hyp": {}, "history": history}, "last.pt")
