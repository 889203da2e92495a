"""compare.py: networks trained, scored and measured side by side; what fails costs its own row only."""
from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import data_yaml, model_yaml

import compare
import train
from models import profile
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.compare import comparison, runs
from utils.compare.entrants import Entrant, check_settings, find_entrants, image_size
from utils.compare.report import rank_notes, write_report
from utils.compare.rows import Profile, Row, columns_of, mean_and_std, spearman
from utils.compare.runs import Run, command, plan_runs
from utils.compare.scores import Score
from utils.compare.table import as_csv, as_latex, as_markdown, as_text
from utils.config import CompareConfig
from utils.errors import UserError
from utils.files import ROOT
from utils.measure.timing import Latency
from utils.plots.comparison import pareto_front

# who takes part


def test_names_come_from_files_and_runs(tmp_path: Path) -> None:
    weights = ["runs/train/first/weights/best.pt", "weights/light.pt"]
    entrants = find_entrants(["yolov5n.yaml", "models/yolov5s-shuffle*.yaml"], weights)
    assert [e.name for e in entrants[:2]] == ["yolov5n", "yolov5s-shuffle-c3"] and entrants[0].cfg == "yolov5n.yaml"
    assert [e.name for e in entrants[-2:]] == ["first", "light"] and entrants[-1].weights == "weights/light.pt"
    assert find_entrants(["yolov5n.yaml", "yolov5n.yaml"], []) == [Entrant("yolov5n", cfg="yolov5n.yaml")]
    assert find_entrants(["yolov5n.yaml", "models/yolov5n.yaml", str(ROOT / "models/yolov5n.yaml")], []) == [Entrant("yolov5n", cfg="yolov5n.yaml")]
    (tmp_path / "net[1].yaml").touch()
    assert find_entrants([str(tmp_path / "net[1].yaml")], [])[0].name == "net[1]"
    assert len(find_entrants(["models/*.yaml"], [])) > 12


@pytest.mark.parametrize(
    ("cfgs", "weights", "message"),
    [((), (), "name the networks: --cfg"), (("no*such.yaml",), (), r"no\*such.yaml: no file fits it"),
     (("a/net.yaml", "b/net.yaml"), (), "a/net.yaml and b/net.yaml: 2 networks named net"),
     (("net.yaml",), ("net/weights/best.pt",), "2 networks named net")],
)  # fmt: skip
def test_entrants_that_can_not_be(cfgs: tuple[str, ...], weights: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_entrants(cfgs, weights)


def test_a_folder_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    config = CompareConfig(data="bccd.yaml", imgsz=640)
    check_settings(tmp_path, config, "abc", "t")
    check_settings(tmp_path, dataclasses.replace(config, seeds=(0, 1), cfg=("more.yaml",), data="bccd", workers=0), "abc", "t")
    with pytest.raises(UserError, match=r"holds a comparison with --imgsz 640 --epochs 100: repeat these to go on with it, or give another --name"):
        check_settings(tmp_path, dataclasses.replace(config, imgsz=320, epochs=5), "abc", "t")
    for of_val, of_training in (("abd", "t"), ("abc", "u")):
        with pytest.raises(UserError, match="holds a comparison on other images or labels: give another --name"):
            check_settings(tmp_path, config, of_val, of_training)
    check_settings(tmp_path, config, "abc", "")  # checkpoints alone are trained on nothing
    check_settings(tmp_path / "later", dataclasses.replace(config, epochs=7), "abc", "")  # nothing is trained: no number of epochs holds
    with pytest.raises(UserError, match="on other images or labels"):
        check_settings(tmp_path / "later", config, "abd", "other")
    check_settings(tmp_path / "later", config, "abc", "t")  # what is refused leaves nothing
    with pytest.raises(UserError, match="with no --single-cls: repeat these"):
        check_settings(tmp_path, dataclasses.replace(config, single_cls=True), "abc", "t")


def test_checkpoints_are_scored_at_their_own_size(tmp_path: Path) -> None:
    entrants = []
    for name, size in (("a", 320), ("b", 320), ("c", None), ("d", 64)):
        save_checkpoint(tmp_path / f"{name}.pt", Checkpoint({}, (), {}, imgsz=size))
        entrants.append(Entrant(name, weights=str(tmp_path / f"{name}.pt")))
    assert image_size(CompareConfig(), entrants[:3]) == 320
    assert image_size(CompareConfig(), [entrants[2], Entrant("gone", weights="gone.pt"), Entrant("new", cfg="new.yaml")]) == 640
    assert image_size(CompareConfig(imgsz=96), entrants) == 96
    with pytest.raises(UserError, match=r"several sizes, .*b\.pt at 320 and .*d\.pt at 64 pixels: give one --imgsz"):
        image_size(CompareConfig(), entrants)


# trainings


def test_every_network_has_its_turn_before_the_next_seed(tmp_path: Path) -> None:
    entrants = [Entrant("a", cfg="a.yaml"), Entrant("done", weights="done.pt"), Entrant("b", cfg="b.yaml")]
    assert [run.folder.name for run in plan_runs(entrants, (0, 7, 0), tmp_path)] == ["a-seed0", "b-seed0", "a-seed7", "b-seed7"]


def test_what_earlier_sittings_trained(tmp_path: Path) -> None:
    for name in ("a-seed0", "a-seed1", "b-seed3", "c-seed0", "nothing"):
        (tmp_path / "runs" / name / "weights").mkdir(parents=True)
        (tmp_path / "runs" / name / "weights" / "last.pt").touch()
    entrants = [Entrant("a", cfg="a.yaml"), Entrant("c", weights="c.pt")]
    found = runs.runs_of_before(tmp_path, entrants, plan_runs(entrants, (0,), tmp_path))
    assert [(run.entrant.name, run.seed) for run in found] == [("a", 1), ("b", 3)], "c is a checkpoint of the user's"
    assert found[0].entrant is entrants[0] and found[1].entrant.weights == str(tmp_path / "runs/b-seed3/weights/best.pt")


def test_the_command_of_a_training(tmp_path: Path) -> None:
    run = Run(Entrant("a", cfg="a.yaml"), 3, tmp_path / "runs" / "a-seed3")
    words = " ".join(command(run, CompareConfig(data="bccd.yaml", epochs=9, single_cls=True)))
    assert "--cfg a.yaml --seed 3" in words and "--epochs 9 --time-limit 0.0 --patience 0" in words and words.endswith("--single-cls")
    assert "--plugin" not in words
    assert "--epochs 100000 --time-limit 2.5" in " ".join(command(run, CompareConfig(data="bccd.yaml", budget_minutes=2.5)))
    run.last.parent.mkdir(parents=True)
    run.last.touch()
    assert command(run, CompareConfig(data="bccd.yaml", device="cpu")) == ["--resume", str(run.last), "--device", "cpu", "--workers", "8"]
    assert command(run, CompareConfig(data="bccd.yaml", plugin="p.py"))[-2:] == ["--plugin", "p.py"], "a checkpoint's own is not run"


def test_no_training_outlives_its_comparison(tmp_path: Path, monkeypatch) -> None:
    """`kill -INT` of the comparison alone, unlike Ctrl-C, doesn't reach the training."""
    done = tmp_path / "done"
    (tmp_path / "train.py").write_text(f"import sys, time\nprint(file=sys.stderr, flush=True)\ntime.sleep(3)\nopen({str(done)!r}, 'w')\n")

    class Terminal:
        buffer = property(lambda self: self)

        def write(self, words: bytes) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "_GRACE_S", 0.1)
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(KeyboardInterrupt):
        runs.train(Run(Entrant("a", cfg="a.yaml"), 0, tmp_path / "a-seed0"), CompareConfig(data="bccd.yaml"))
    assert not done.exists()


# figures and tables, by hand


def row(name: str, ms: float | None, gflops: float, *scores: float, **more: object) -> Row:
    profile = Profile(int(gflops * 1e6), gflops, 2.5, 30, {("PyTorch fp32", 1): Latency(ms, ms * 1.5, 0.1, 9)} if ms else {})
    score = {seed: {"val": Score({"mAP50": value * 2, "mAP50-95": value}, [value], [])} for seed, value in enumerate(scores)}
    learning = {seed: np.array([[1, 1.5, 0], [2, 3.0, value]]) for seed, value in enumerate(scores)}
    return Row(Entrant(name, cfg=f"{name}.yaml"), profile, score, learning, **more)


ROWS = [row("a_light", 10.0, 2.0, 0.3, 0.4), row("b", 20.0, 4.0, 0.5), Row(Entrant("broken", cfg="broken.yaml"), problems=["no such model YAML"])]
COLUMNS = columns_of(ROWS, ["val", "test"], [("PyTorch fp32", 1)])


def test_mean_and_deviation() -> None:
    assert mean_and_std([0.3]) == (0.3, None)
    mean, std = mean_and_std([0.3, 0.4])
    assert mean == pytest.approx(0.35) and std == pytest.approx(0.1 / math.sqrt(2))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 3], [10, 20, 30], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8), ([1, 1, 2], [1, 2, 3], math.sqrt(0.75)),
     ([1], [1], math.nan), ([1, 1], [1, 2], math.nan)],
)  # fmt: skip
def test_rank_correlation_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(a, b) == pytest.approx(expected, nan_ok=True)


def test_networks_are_ranked_by_the_first_runtime_that_was_asked_for(tmp_path: Path) -> None:
    """Even where the first of them fails in it; one that fails somewhere is not the last for that."""
    rows = [row("broken", None, 1.0), row("slow", 20.0, 2.0), row("fast", 2.0, 3.0, problems=["TorchScript: does not run"])]
    rows[0].profile.latency["TorchScript", 1] = rows[1].profile.latency["TorchScript", 1] = Latency(1.0, 1.0, 0.1, 3)
    write_report(tmp_path, "costs", rows, {}, [("PyTorch fp32", 1), ("TorchScript", 1)], [], pictures=False)
    table = list(csv.DictReader((tmp_path / "costs.csv").read_text().splitlines()))
    assert [r["network"] for r in table] == ["fast", "slow", "broken"]
    assert [key for key in table[0] if "p50" in key] == ["PyTorch fp32 b1 p50 (ms)", "TorchScript b1 p50 (ms)"]


def test_what_flops_say_of_latency() -> None:
    misled = [row("a", 30.0, 1.0), row("b", 20.0, 2.0), row("c", 10.0, 3.0), row("d", None, 4.0)]
    assert "of 3 networks: GFLOPs -1.00, parameters -1.00" in rank_notes(misled, [("PyTorch fp32", 1)])[0]
    assert rank_notes(misled[:2], [("PyTorch fp32", 1)]) == []


def test_the_front_holds_what_nothing_beats() -> None:
    assert pareto_front([3, 1, 2, 2, 5], [0.5, 0.2, 0.1, 0.4, 0.5]) == [1, 3, 0]
    assert pareto_front([], []) == []


def test_columns_without_a_figure_are_left_out() -> None:
    titles = [column.title for column in COLUMNS]
    assert titles == ["params (M)", "GFLOPs", "file (MB)", "memory (MB)", "PyTorch fp32 b1 p50 (ms)", "PyTorch fp32 b1 p90 (ms)", "val mAP50",
                      "val mAP50-95", "training (min)"]


def test_tables_say_the_same() -> None:
    table = list(csv.DictReader(as_csv(ROWS, COLUMNS).splitlines()))
    assert [r["network"] for r in table] == ["a_light", "b", "broken"]
    assert (table[0]["val mAP50-95"], table[0]["val mAP50-95 n"], table[1]["val mAP50-95 std"]) == ("0.35", "2", "")
    assert float(table[0]["val mAP50-95 std"]) == pytest.approx(0.0707107) and table[2]["problem"] == "no such model YAML" and not table[2]["GFLOPs"]
    assert table[1]["PyTorch fp32 b1 p90 (ms)"] == "30"
    markdown = as_markdown(ROWS, COLUMNS, ["on a machine"]).splitlines()
    assert len({line.count("|") for line in markdown[:5]}) == 1
    assert "| 0.350 ± 0.071 |" in markdown[2] and "| 0.500 |" in markdown[3] and "| – |" in markdown[4]
    assert "- **broken: no such model YAML**" in markdown and markdown[-1] == "- on a machine"
    latex = as_latex(ROWS, COLUMNS, ["50 % of it"])
    assert r"a\_light & 2.00" in latex and r"0.350 $\pm$ 0.071" in latex and "% 50 % of it" in latex
    assert "% broken: no such model YAML" in latex and latex.count(r"\\") == 4
    odd = as_markdown([row("a|b", 1.0, 1.0)], [], []).splitlines()
    assert odd[:3] == ["| network |", "| --- |", r"| a\|b |"]
    text = as_text(ROWS, COLUMNS)
    assert "p90" not in text and len({len(line) for line in text.splitlines()}) == 1


# the whole


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two epochs on tiny images; trained in this process, for speed."""
    monkeypatch.setattr(comparison, "train", lambda run, config: train.main(command(run, config)))
    return ["--data", str(data_yaml(tmp_path)), "--imgsz", "64", "--epochs", "2", "--batch-size", "4", "--device", "cpu", "--precision", "fp32",
            "--workers", "0", "--project", str(tmp_path / "runs"), "--name", "both", "--runtimes", "PyTorch-fp32", "--batches", "1"]


def table_of(folder: Path, name: str = "compare.csv") -> dict[str, dict[str, str]]:
    with open(folder / name, newline="") as file:
        return {r["network"]: r for r in csv.DictReader(file)}


def test_one_is_added_one_fails_and_none_is_trained_twice(tmp_path: Path, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    first, second = (str(model_yaml(tmp_path, name=f"{name}.yaml", width=width)) for name, width in (("small", 8), ("wide", 16)))
    folder = tmp_path / "runs" / "both"
    assert compare.main(["--cfg", first, *flags, "--noplots"]) == 0
    trained = folder / "runs" / "small-seed0" / "weights" / "last.pt"
    before = trained.stat().st_mtime_ns

    last = load_checkpoint(trained)
    unfinished = folder / "runs" / "wide-seed0"  # a training that was interrupted after its first epoch
    assert train.main([*command(Run(Entrant("wide", cfg=second), 0, unfinished), CompareConfig(data=flags[1], imgsz=64, batch_size=4, workers=0)),
                       "--epochs", "2", "--time-limit", "1e-6"]) == 0
    last = load_checkpoint(unfinished / "weights" / "last.pt")
    last.training["finished"] = False
    last.training["config"]["time_limit"] = 0.0
    save_checkpoint(unfinished / "weights" / "last.pt", last)
    capfd.readouterr()

    assert compare.main(["--cfg", first, second, "gone.yaml", *flags, "--layers"]) == 1
    out = "".join(capfd.readouterr())
    assert trained.stat().st_mtime_ns == before and "going on with" in out and "gone.yaml: no such model YAML" in out
    table = table_of(folder)
    assert set(table) == {"small", "wide", "gone"} and "no such model YAML" in table["gone"]["problem"]
    for name in ("small", "wide"):
        assert all(table[name][key] for key in ("params (M)", "PyTorch fp32 b1 p50 (ms)", "val mAP50-95", "test mAP50", "training (min)")), name
    assert float(table["wide"]["params (M)"]) > float(table["small"]["params (M)"])
    for name in ("pareto.png", "learning.png", "learning_by_time.png", "class_ap.png", "sheet.jpg", "layers-small.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20, name
    with open(folder / "class_ap.csv", newline="") as file:
        assert [r["network"] for r in csv.DictReader(file)] == [r for r in table if r != "gone"]
    assert (folder / "compare.md").read_text().count("| small |") == 1

    third = str(model_yaml(tmp_path, name="third.yaml", width=8, levels=2))
    assert compare.main(["--cfg", third, *flags, "--noplots"]) == 0
    assert trained.stat().st_mtime_ns == before
    table = table_of(folder)
    assert set(table) == {"small", "wide", "third"} and all(r["val mAP50-95"] and r["training (min)"] for r in table.values())
    assert compare.main(["--cfg", first, *flags, "--noplots", "--seeds", "1"]) == 0
    assert table_of(folder)["small"]["val mAP50-95 n"] == "2" and "seeds 0 1, not all of each network, fp32;" in (folder / "compare.md").read_text()


def test_checkpoints_are_scored_once_and_other_classes_cost_a_row(tmp_path: Path, flags: list[str], shared: Path) -> None:
    assert train.main(["--cfg", str(model_yaml(tmp_path)), *flags[:14], "--noplots", "--project", str(tmp_path / "runs"), "--name", "mine"]) == 0
    mine, other = tmp_path / "runs" / "mine" / "weights" / "best.pt", shared / "weights" / "yolov5n.pt"
    assert compare.main(["--weights", str(mine), str(other), *flags, "--noplots"]) == 1
    table = table_of(tmp_path / "runs" / "both")
    assert not table["mine"]["problem"] and table["mine"]["val mAP50-95"]
    assert "80 classes" in table["yolov5n"]["problem"] and table["yolov5n"]["PyTorch fp32 b1 p50 (ms)"]
    scores = tmp_path / "runs" / "both" / "scores" / "mine.json"
    before = scores.stat().st_mtime_ns
    assert compare.main(["--weights", str(mine), *flags, "--noplots"]) == 0
    assert scores.stat().st_mtime_ns == before
    moved = shutil.copytree(tmp_path, tmp_path / "elsewhere" / "moved")  # with its files' times
    elsewhere = [str(moved / Path(flag).name) if flag == flags[1] else flag for flag in flags]
    assert compare.main(["--weights", str(mine), *elsewhere, "--noplots"]) == 0
    assert scores.stat().st_mtime_ns == before, "the same images at another place"
    save_checkpoint(mine, dataclasses.replace(load_checkpoint(mine), metrics={}))
    assert compare.main(["--weights", str(mine), *flags, "--noplots"]) == 0
    assert scores.stat().st_mtime_ns > before, "another file, yet its old scores"


def test_other_networks_of_one_name_are_told_apart(tmp_path: Path, flags: list[str]) -> None:
    """An edited YAML, or other hyperparameters, must not be given the scores of the old one."""
    cfg = model_yaml(tmp_path)
    hyp = tmp_path / "calm.yaml"
    hyp.write_text("lr0: 0.001\n")
    assert compare.main(["--cfg", str(cfg), *flags, "--noplots"]) == 0
    assert compare.main(["--cfg", str(cfg), *flags, "--noplots", "--hyp", str(hyp)]) == 1
    assert "was trained with other hyperparameters" in table_of(tmp_path / "runs" / "both")["tiny"]["problem"]
    model_yaml(tmp_path, anchors=3)
    assert compare.main(["--cfg", str(cfg), *flags, "--noplots"]) == 0, "as many anchors a level"
    model_yaml(tmp_path, anchors=2)
    assert compare.main(["--cfg", str(cfg), *flags, "--noplots"]) == 1
    model_yaml(tmp_path, width=16)
    assert compare.main(["--cfg", str(cfg), *flags, "--noplots"]) == 1
    table = table_of(tmp_path / "runs" / "both")["tiny"]
    assert "was trained with other network of the same name: remove that folder" in table["problem"] and not table.get("val mAP50-95")
    compare.main(["--cfg", str(cfg), *flags, "--noplots", "--seeds", "1"])  # the edited one
    third = str(model_yaml(tmp_path, name="third.yaml", levels=2))
    assert compare.main(["--cfg", third, *flags, "--noplots"]) == 1
    table = table_of(tmp_path / "runs" / "both")
    assert "seed 1: " in table["tiny"]["problem"] and "other network of the same name" in table["tiny"]["problem"]
    assert float(table["tiny"]["val mAP50-95"]) >= 0 and table["tiny"].get("val mAP50-95 n", "1") == "1" and not table["third"]["problem"]


def test_a_test_split_that_is_missing_or_unlabelled_is_left_out(tmp_path: Path, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for label in (tmp_path / "labels" / "test").glob("*.txt"):
        label.unlink()
    argv = ["--cfg", str(model_yaml(tmp_path)), *flags, "--noplots"]
    assert compare.main(argv) == 0 and "no scores on the test split: it has no labels" in capfd.readouterr().out
    shutil.rmtree(tmp_path / "images" / "test")
    assert compare.main(argv) == 0 and "no scores on the test split: " in capfd.readouterr().out
    assert "test mAP50" not in table_of(tmp_path / "runs" / "both")["tiny"]


def test_a_block_that_breaks_costs_its_row(tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad, counted = model_yaml(tmp_path, name="good.yaml"), model_yaml(tmp_path, name="bad.yaml"), profile.count
    monkeypatch.setattr(profile, "count", lambda model, imgsz: 1 / 0 if model.spec.origin == "bad.yaml" else counted(model, imgsz))
    assert compare.main(["--cfg", str(bad), str(good), *flags[2:], "--noplots"]) == 1
    table = table_of(tmp_path / "runs" / "both", "costs.csv")
    assert "ZeroDivisionError" in table["bad"]["problem"] and table["good"]["PyTorch fp32 b1 p50 (ms)"]
    monkeypatch.setattr(profile, "draw_rows", lambda *_: 1 / 0)
    assert compare.main(["--cfg", str(good), *flags[2:], "--noplots", "--layers"]) == 1
    assert "ZeroDivisionError" in table_of(tmp_path / "runs" / "both", "costs.csv")["good"]["problem"]


def test_costs_alone_need_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = str(model_yaml(tmp_path))
    argv = ["--cfg", cfg, "--imgsz", "60", "--device", "cpu", "--project", str(tmp_path), "--name", "costs", "--batches", "1", "2"]
    assert compare.main([*argv, "--runtimes", "PyTorch-fp32", "TorchScript"]) == 0
    table = table_of(tmp_path / "costs", "costs.csv")["tiny"]
    assert all(float(table[f"{runtime} b{batch} p50 (ms)"]) > 0 for runtime in ("PyTorch fp32", "TorchScript") for batch in (1, 2))
    assert not list((tmp_path / "costs").glob("*.png"))
    assert "- tiny: at 64 px, the next whole number of its largest stride\n" in (tmp_path / "costs" / "costs.md").read_text()
    capfd.readouterr()
    monkeypatch.setattr("utils.measure.runtimes.pip_install", lambda packages: f"needs {' '.join(packages)}" if packages else None)
    assert compare.main([*argv, "--runtimes", "PyTorch-fp32", "openvino"]) == 1, "asked for, and not there"
    assert compare.main([*argv, "--runtimes", "Torch-Skript"]) == 2
    assert "no such runtime; did you mean torchscript" in capfd.readouterr().err


def test_what_is_measured_is_written_before_the_next_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.measure.runtimes.trace", interrupted)
    argv = ["--cfg", str(model_yaml(tmp_path)), "--imgsz", "64", "--device", "cpu", "--project", str(tmp_path), "--name", "costs", "--batches", "1"]
    assert compare.main([*argv, "--runtimes", "PyTorch-fp32", "TorchScript"]) == 2
    assert float(table_of(tmp_path / "costs", "costs.csv")["tiny"]["PyTorch fp32 b1 p50 (ms)"]) > 0


def test_a_training_that_fails_costs_its_row(tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, whose last line is the reason."""
    monkeypatch.undo()
    hyp = tmp_path / "wild.yaml"
    hyp.write_text("lr0: 1.0e+30\nwarmup_epochs: 0\n")
    assert compare.main(["--cfg", str(model_yaml(tmp_path)), *flags, "--hyp", str(hyp), "--noplots"]) == 1
    assert "the loss is not finite" in table_of(tmp_path / "runs" / "both")["tiny"]["problem"]
