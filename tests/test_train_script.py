"""train.py from the command line: every flag on a tiny set, and one clear line for every mistake."""
from __future__ import annotations

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from tiny import NAMES, model_yaml, tiny_model, train_flags

import train
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.files import ROOT, only_writer

SCRIPT = [sys.executable, str(ROOT / "train.py")]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def run(flags: list[str], *extra: str, name: str = "exp") -> Path:
    """The folder of a run that must end well."""
    assert train.main([*flags, "--name", name, *extra]) == 0
    return Path(flags[flags.index("--project") + 1]) / name


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.glob("**/*") if p.is_file() and "tfevents" not in p.name}


PLAIN = {"weights/best.pt", "weights/last.pt", "results.csv", "opt.yaml", "hyp.yaml"}


@pytest.mark.parametrize(
    "extra",
    [["--rect"], ["--multi-scale"], ["--image-weights"], ["--cache", "disk"], ["--cache", "none"], ["--optimizer", "AdamW"], ["--cos-lr"],
     ["--label-smoothing", ".1"], ["--batch-size", "-1"], ["--noautoanchor"], ["--single-cls"], ["--img", "70", "--batch", "3"],
     ["--precision", "bf16"]],
    ids=" ".join,
)  # fmt: skip
def test_flags_train(flags: list[str], extra: list[str]) -> None:
    folder = run(flags, *extra, name=" ".join(extra).strip("-"))
    assert files(folder) == PLAIN and len(rows(folder)) == 2
    assert all(np.isfinite(float(row["train/box_loss"])) and float(row["train/box_loss"]) > 0 for row in rows(folder))
    settings = yaml.safe_load((folder / "opt.yaml").read_text())
    assert settings["batch_size"] == {"-1": 6, "3": 3}.get(extra[-1], 4) and settings["imgsz"] == (96 if "--img" in extra else 64)
    names = load_checkpoint(folder / "weights" / "best.pt").names
    assert names == (("item",) if extra == ["--single-cls"] else ("red", "green"))


def test_flags_change_what_they_should(flags: list[str]) -> None:
    """Each of these alters the numbers; a flag that nothing reads would not."""
    seen = {}
    for extra in ([], ["--rect"], ["--multi-scale"], ["--image-weights"], ["--optimizer", "Adam"], ["--label-smoothing", ".2"], ["--seed", "1"]):
        seen[" ".join(extra)] = rows(run(flags, *extra, "--epochs", "1", name="change" + "".join(extra)))[0]["train/cls_loss"]
    again = rows(run(flags, "--epochs", "1", "--cache", "none", name="uncached"))[0]["train/cls_loss"]
    assert again == seen[""], "the cache alters nothing"
    seen.pop("--optimizer Adam")  # acts from the second step on
    assert len(set(seen.values())) == len(seen), seen


def test_freeze(flags: list[str], place: Path) -> None:
    start = tiny_model(place)
    save_checkpoint(place / "start.pt", Checkpoint(start.spec.to_dict(), start.names, dict(start.state_dict())))
    for name, freeze, frozen in (("first", ["2"], {0, 1}), ("named", ["0", "3"], {0, 3})):
        folder = run(flags, "--weights", str(place / "start.pt"), "--freeze", *freeze, name=name)
        trained = load_checkpoint(folder / "weights" / "last.pt").training["model"]
        for key, value in start.state_dict().items():
            if key.endswith("conv.weight"):
                assert torch.equal(trained[key], value) == (int(key.split(".")[1]) in frozen), key


def test_save_period_noval_nosave(flags: list[str]) -> None:
    assert files(run(flags, "--save-period", "1", name="period")) == PLAIN | {"weights/epoch1.pt", "weights/epoch2.pt"}
    folder = run(flags, "--noval", name="noval")
    assert [row["metrics/mAP_0.5"] != "" for row in rows(folder)] == [False, True] and files(folder) == PLAIN
    folder = run(flags, "--nosave", name="nosave")
    assert files(folder) == PLAIN, "best.pt is there in the end"
    best, last = (load_checkpoint(folder / "weights" / name).state_dict for name in ("best.pt", "last.pt"))
    assert all(torch.equal(best[key], last[key].half() if last[key].is_floating_point() else last[key]) for key in best)


def test_time_limit_and_patience(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert len(rows(run(flags, "--time-limit", "1e-6", "--epochs", "9", name="limit"))) == 1
    assert "time limit" in capfd.readouterr().out
    last = str(Path(flags[flags.index("--project") + 1]) / "limit" / "weights" / "last.pt")
    assert "its --time-limit or --patience ended it after epoch 1 of 9: give another of these" in error_of(["--resume", last], capfd)
    assert train.main(["--resume", last, "--time-limit", "9", "--epochs", "2"]) == 0
    assert "finished after 2 epochs" in error_of(["--resume", last, "--epochs", "1"], capfd)
    folder = run(flags, "--time-limit", "0.05", "--epochs", "99999", name="budget")  # three seconds
    rates = [float(row["x/lr1"]) for row in rows(folder)]
    taken = load_checkpoint(folder / "weights" / "last.pt").training["seconds"]
    assert 1 < len(rates) < 99999 and 3 - 0.6 * taken / len(rates) < taken, "no earlier than half an epoch before"
    folder = run(flags, "--patience", "1", "--epochs", "60", name="patience")  # a fitness that rises at 60 epochs running is not to be had
    table = rows(folder)
    fitness = [0.1 * float(r["metrics/mAP_0.5"]) + 0.9 * float(r["metrics/mAP_0.5:0.95"]) for r in table]
    assert len(table) < 60 and max(fitness[:-1]) >= fitness[-1] and "stopped early" in capfd.readouterr().out
    folder = run(flags, "--noval", "--time-limit", "1e-6", "--epochs", "9", name="unseen")
    assert files(folder) == PLAIN, "never validated, yet there is a best.pt"


def test_a_folder_that_exists(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Numbered, or with --exist-ok written into: and a best.pt of another network there is not taken for this run's."""
    wide = model_yaml(place, name="wide.yaml", width=16)
    folder = run(flags, "--cfg", str(wide), "--epochs", "1", name="again")
    assert run(flags, "--epochs", "1", name="again") == folder and (folder.parent / "again2" / "results.csv").exists()
    assert load_checkpoint(folder / "weights" / "best.pt").spec != load_checkpoint(folder.parent / "again2" / "weights" / "best.pt").spec
    for extra in (["--nosave"], ["--noval", "--time-limit", "1e-6"], []):
        run(flags, "--exist-ok", *extra, name="again")
        assert load_checkpoint(folder / "weights" / "best.pt").spec == load_checkpoint(folder.parent / "again2" / "weights" / "best.pt").spec


def test_transfer_says_what_was_taken(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Weights of three classes and of another width: the head, or all but nothing, stays at its start."""
    other = tiny_model(place, names=("a", "b", "c"), seed=5)
    save_checkpoint(place / "three.pt", Checkpoint(other.spec.to_dict(), other.names, dict(other.state_dict())))
    capfd.readouterr()
    run(flags, "--weights", str(place / "three.pt"), "--epochs", "1", name="transfer")
    own = tiny_model(place).state_dict()
    taken = len(own) - 7  # three convolutions' weights and biases, and the anchors, which the YAML names itself
    assert f"three.pt: {taken} of {len(own)} tensors taken; not taken: model.5.anchors, model.5.m.0.weight" in capfd.readouterr().out
    no_cfg = flags[2:]
    run(no_cfg, "--weights", str(place / "three.pt"), "--epochs", "1", name="transfer2")
    assert f"{taken + 1} of {len(own)} tensors taken" in capfd.readouterr().out


def test_hyp_with_everything(flags: list[str], place: Path) -> None:
    hyp = place / "my_hyp.yaml"
    hyp.write_text("{mixup: 1.0, perspective: 0.001, degrees: 10, shear: 3, flipud: 0.5, fl_gamma: 0.0, lr0: 0.02}")
    folder = run(flags, "--hyp", str(hyp), name="hyp")
    stored = yaml.safe_load((folder / "hyp.yaml").read_text())
    assert stored["mixup"] == 1 and stored["lr0"] == 0.02 and stored["momentum"] == 0.937


def test_pictures_and_last_lines(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    folder = run([f for f in flags if f != "--noplots"], "--epochs", "1", name="pictures")
    for name in ("labels.jpg", "train_batch0.jpg", "results.png", "val_batch0.jpg", "confusion_matrix.png",
                 "PR_curve.png", "P_curve.png", "R_curve.png", "F1_curve.png"):
        assert cv2.imread(str(folder / name)) is not None, name
    out = capfd.readouterr().out
    assert str(folder / "weights" / "best.pt") in out and str(folder / "results.png") in out and "python detect.py --weights" in out


def test_anchors_as_a_number_are_fitted(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = model_yaml(place, name="count.yaml", anchors=2)
    folder = run(flags, "--cfg", str(cfg), "--noautoanchor", "--epochs", "1", name="count")
    assert "refitted" in capfd.readouterr().out
    assert np.array(load_checkpoint(folder / "weights" / "best.pt").spec["anchors"]).shape == (3, 4)


# mistakes


def error_of(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with; its exit code must be 2."""
    capfd.readouterr()
    assert train.main(argv) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert len(err) == 1, err
    return err[0]


def test_mistakes_are_one_line(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad_hyp, blocked = place / "bad.yaml", place / "blocked"
    bad_hyp.write_text("momentun: 0.9\n")
    blocked.write_text("a file")
    empty = place / "empty"
    (empty / "images").mkdir(parents=True)
    (place / "empty.yaml").write_text(f"path: {empty}\ntrain: images\nval: images\nnames: [red, green]\n")
    (place / "gone.yaml").write_text("path: gone\ntrain: images\nval: images\nnames: [red]\n")
    cases = [
        (["--data", "nowhere.yaml"], "nowhere.yaml: no such data YAML; looked at"),
        (["--data", str(place / "gone.yaml")], "gone.yaml: images is missing; looked at"),
        (["--data", str(place / "empty.yaml")], "no images in"),
        (["--cfg", "yolov5s-gost.yaml"], "did you mean yolov5s-ghost.yaml"),
        (["--weights", "nowhere.pt"], "nowhere.pt: no such weights file"),
        (["--weights", str(bad_hyp)], "bad.yaml"),
        (["--hyp", str(bad_hyp)], "momentun: unknown key; did you mean momentum"),
        (["--batch-size", "1000000"], "GB are free: use --batch-size"),
        (["--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--epochs", "0"], "--epochs 0: must be above 0"),
        (["--freeze", "99"], "--freeze 99: the network's rows are 0 to 5"),
        (["--freeze", "6"], "leaves nothing to train"),
        (["--freeze", "-1"], "--freeze"),
        (["--project", str(blocked)], "blocked"),
        (["--precision", "fp16"], "CUDA"),
        (["--plugin", "nowhere.py"], "nowhere.py"),
        (["--rect", "--image-weights"], "leave one of them out"),
    ]  # fmt: skip
    if not torch.cuda.is_available():
        cases.append((["--device", "0"], "sees no CUDA device here: use --device cpu"))
    for extra, message in cases:
        assert message in error_of([*flags, *extra, "--name", "mistake"], capfd), extra
    assert "name a network: --cfg" in error_of(flags[2:], capfd)
    assert not list((place / "runs").glob("mistake*"))
    assert blocked.read_text() == "a file"


def test_loss_that_is_not_finite_stops_with_its_parts(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "hot.yaml").write_text("{lr0: 1.0e+30, warmup_bias_lr: 1.0e+30}")
    message = error_of([*flags, "--hyp", str(place / "hot.yaml"), "--epochs", "20", "--batch-size", "2", "--name", "hot"], capfd)
    assert "the loss is not finite at batch" in message and all(part in message for part in ("box", "obj", "cls", "nan")) and "lower lr0" in message


def test_processes_must_agree_on_the_precision(flags: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather", lambda world, value: [value, "torch.bfloat16"])
    assert "the GPUs are of unlike kinds: name a precision that all have" in error_of(flags, capfd)


def test_weights_of_no_detector(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(2)}, place / "other.pt")
    assert "other.pt" in error_of([*flags, "--weights", str(place / "other.pt")], capfd)


# as a process of its own


@pytest.mark.parametrize("script", ["train", "val"])
def test_help_needs_no_torch(script: str) -> None:
    code = f"import sys, {script}\ntry: {script}.main(['--help'])\nexcept SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--weights" in done.stdout, done.stderr


def start(argv: list[str], **options: object) -> subprocess.Popen:
    return subprocess.Popen([*SCRIPT, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, cwd=ROOT, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_in_mid_epoch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Sent to the whole group, as a terminal does; with worker processes. Then the run goes on."""
    flags = train_flags(tmp_path, train=40)
    process = start([*flags, "--epochs", "500", "--workers", "2"], start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # which a background job's children have lost
    results = tmp_path / "runs" / "exp" / "results.csv"
    for _ in range(3000):
        if process.poll() is not None or (results.exists() and len(results.read_text().splitlines()) > 2):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    lines = err.replace("\r", "\n").splitlines()
    errors = [line for line in lines if "rror" in line or "Traceback" in line]
    assert len(errors) == 1 and errors[0].startswith("error: interrupted: what was finished is whole on disk; train.py goes on with --resume")
    last = tmp_path / "runs" / "exp" / "weights" / "last.pt"
    done = load_checkpoint(last).training["epoch"]
    assert done >= 1
    assert train.main(["--resume", str(last), "--epochs", str(done + 1), "--workers", "0"]) == 0
    assert len(rows(tmp_path / "runs" / "exp")) == done + 1


@pytest.mark.parametrize(("extra", "side"), [([], 64), (["--multi-scale"], 96)])
def test_the_batch_is_fitted_at_the_largest_size(flags: list[str], monkeypatch: pytest.MonkeyPatch, extra: list[str], side: int) -> None:
    def stop(model: object, batch_size: int, imgsz: int, *_: object) -> int:
        raise UserError(f"measured at {imgsz}, asked for {batch_size}")

    monkeypatch.setattr("utils.training.memory.fit_batch", stop)
    with pytest.raises(UserError, match=f"measured at {side}, asked for -1"):
        train.main.__wrapped__([*flags, "--batch-size", "-1", *extra])


def test_resume_goes_on_where_last_pt_lies(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder by its path, ~ included; not from a copy that lies elsewhere."""
    folder = run(flags, "--epochs", "1", name="far")
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(folder))
    assert train.main(["--resume", "~/weights/last.pt", "--epochs", "2"]) == 0
    assert len(rows(folder)) == 2
    shutil.copy(folder / "weights" / "last.pt", place / "copy.pt")
    assert "copy.pt: --resume goes on in the run's folder" in error_of(["--resume", str(place / "copy.pt"), "--epochs", "3"], capfd)


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no locks there")
def test_a_folder_in_which_another_process_trains(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run(flags, "--epochs", "1", name="held")
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    with only_writer(folder):
        for argv in (["--resume", str(folder / "weights" / "last.pt"), "--epochs", "2"], [*flags, "--epochs", "1", "--name", "held", "--exist-ok"]):
            assert "held: another process writes there now: wait for its end, or name another folder" in error_of(argv, capfd)
        told = error_of(["--resume", "--project", str(folder)], capfd)
        assert "no weights/last.pt below" in told and "but where another process trains now; name one" in told
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    assert train.main(["--resume", str(folder / "weights" / "last.pt"), "--epochs", "2"]) == 0


def test_a_mistake_that_shows_late_leaves_no_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = train_flags(tmp_path)
    monkeypatch.setattr("utils.data.imagecache.free_memory_bytes", lambda: 2**10)
    assert "--cache ram: the images take" in error_of([*flags, "--cache", "ram"], capfd)
    assert not (tmp_path / "runs" / "exp").exists()


def test_resume_with_other_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run(train_flags(tmp_path), "--epochs", "1", name="named")
    (yaml,) = tmp_path.glob("*data*.yaml")
    yaml.write_text(yaml.read_text().replace(NAMES[0], "other"))
    assert "has other classes now than when" in error_of(["--resume", str(folder / "weights" / "last.pt"), "--epochs", "2"], capfd)


@pytest.mark.skipif(sys.platform == "win32", reason="limits")
def test_full_disk(tmp_path: Path) -> None:
    """No file may grow beyond 20 kB: last.pt, which is larger, can't be written; the line names it, and no half of it stays."""
    flags = train_flags(tmp_path)
    process = start(flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert process.returncode == 2 and len(lines) == 1 and "last" in lines[0] and "with room" in lines[0], err
    assert not list((tmp_path / "runs" / "exp" / "weights").glob("*last*")) and not list((tmp_path / "runs").glob("**/.*"))
