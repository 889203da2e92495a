"""prune.py: smaller weights that every other script takes, the search behind them, and what is refused in one line."""
from __future__ import annotations

import copy
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from channels import Net, conv, graph_of
from tiny import NAMES, data_yaml, model_yaml, picture_split, tiny_model
from torch import Tensor, nn
from transplant import lived_in

import compare
import detect
import export
import prune
import train
import val
from models import registry
from models.plugin import load_plugin
from models.prune import channel_graph, remove_channels
from models.spec import load_spec
from models.summary import count_gflops
from models.yolo import DetectionModel, build_for_training, load_model
from utils.checkpoint import Checkpoint, cast_floats, load_checkpoint, save_checkpoint
from utils.compress.importance import l1
from utils.compress.norms import reestimate_norms
from utils.compress.plan import Limits, best_of, macs_share, meet, random_shares
from utils.compress.pruning import Pruning, _even, open_slices
from utils.compress.report import save_pruned
from utils.config import PruneConfig, TrainConfig
from utils.data.dataset import TrainDataset, scaled_sizes
from utils.data.imagecache import ImageCache
from utils.data.open import val_loader
from utils.errors import UserError
from utils.evaluate.validate import validate
from utils.export.formats import FORMATS
from utils.files import ROOT, read_yaml
from utils.hyp import Hyp, load_hyp
from utils.measure.runtimes import RUNTIMES
from utils.network import to_input
from utils.training.loss import DetectionLoss
from utils.training.sparsity import build_sparsity

CPU = torch.device("cpu")
FILES = sorted(ROOT.glob("models/**/*.yaml"))
LIGHT = ["yolov5s-shuffle"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and the weights of a network of 16 channels a layer."""
    place = tmp_path_factory.mktemp("prune")
    data_yaml(place, train=20)
    save(place / "tiny.pt", lived_in(tiny_model(place, width=16)))
    return place


def save(path: Path, model: DetectionModel) -> None:
    save_checkpoint(path, Checkpoint(model.spec.to_dict(), model.names, model.state_dict(), imgsz=64))


def run(place: Path, *flags: str, weights: str | Path = "tiny.pt", data: bool = True) -> int:
    """prune.py on the weights in `place`; its runs lie in `place`/runs."""
    named = ["--data", str(place / "tiny_data.yaml"), "--workers", "0"] if data else []
    return prune.main(["--weights", str(place / weights), *named, "--device", "cpu", "--precision", "fp32", "--round-to", "2",
                       "--project", str(place / "runs"), *flags])


def same(a: DetectionModel, b: DetectionModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# what it makes


@pytest.mark.parametrize("method", ["l1", "fpgm", "sfp", "slimming"])
def test_each_method_meets_the_budget(place: Path, method: str) -> None:
    before = (place / "tiny.pt").read_bytes()
    assert run(place, "--method", method, "--target-flops", "0.5", "--name", method, "--noplots", data=False) == 0
    assert (place / "tiny.pt").read_bytes() == before
    left = load_model(str(place / "runs" / method / "pruned.pt"))
    assert 0.4 < count_gflops(left, 64) / count_gflops(load_model(str(place / "tiny.pt")), 64) <= 0.5
    assert {path.name for path in (place / "runs" / method).iterdir()} == {"pruned.pt", "pruned.yaml", "widths.csv", "comparison"}
    rows = list(csv.DictReader((place / "runs" / method / "widths.csv").open()))
    widths = {row["layer"]: (int(row["channels before"]), int(row["channels after"])) for row in rows if not row["kept"]}
    whole = {row["layer"]: (row["channels before"], row["channels after"]) for row in rows if row["kept"] == "whole"}
    assert whole == {f"5.m.{n}": ("21", "21") for n in range(len(whole))} != {}, "Detect's outputs"
    assert len(widths) == 5 and widths["2.conv"] == (16, left.model[2].conv.out_channels)


def test_norms_are_estimated_anew_where_there_is_data(place: Path) -> None:
    assert run(place, "--method", "l1", "--ratio", "0.5", "--name", "estimated") == 0
    assert run(place, "--method", "l1", "--ratio", "0.5", "--name", "as-they-were", "--noplots", data=False) == 0
    with_data, without = (load_model(str(place / "runs" / name / "pruned.pt")) for name in ("estimated", "as-they-were"))
    assert [tuple(p.shape) for p in with_data.parameters()] == [tuple(p.shape) for p in without.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(with_data.parameters(), without.parameters(), strict=True))
    assert all(conv.out_channels == 8 for conv in with_data.modules() if isinstance(conv, nn.Conv2d) and conv.out_channels < 17)
    assert not torch.equal(with_data.model[0].bn.running_mean, without.model[0].bn.running_mean)
    assert (place / "runs" / "estimated" / "widths.png").stat().st_size > 5000
    scores = json.loads((place / "runs" / "estimated" / "comparison" / "scores" / "pruned.json").read_text())["scores"]
    assert scores.keys() == {"val", "test"}


def test_a_search_that_is_interrupted_ends_as_if_it_had_not_been(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    search = ["--target-flops", "0.5"]
    assert run(place, *search, "--candidates", "4", "--name", "whole") == 0
    assert run(place, *search, "--candidates", "2", "--name", "parts", "--noplots") == 0
    assert run(place, *search, "--candidates", "4", "--name", "parts", "--noplots", "--exist-ok") == 0
    whole, parts = place / "runs" / "whole", place / "runs" / "parts"
    assert (whole / "candidates.json").read_bytes() == (parts / "candidates.json").read_bytes()
    assert same(load_model(str(whole / "pruned.pt")), load_model(str(parts / "pruned.pt")))
    assert (whole / "candidates.png").exists() and not (parts / "candidates.png").exists()
    plans = [yaml.safe_load((whole / "plans" / f"{n}.yaml").read_text()) for n in (1, 2, 3, 4)]
    assert [plan["score"] for plan in plans] == sorted((plan["score"] for plan in plans), reverse=True)
    assert all(0.4 < plan["flops"] <= 0.5 for plan in plans) and len({str(plan["channels"]) for plan in plans}) > 1

    assert run(place, *search, "--plan", str(whole / "plans" / "1.yaml"), "--name", "planned", "--noplots") == 2  # a plan is how far to go
    assert run(place, "--plan", str(whole / "plans" / "1.yaml"), "--name", "planned", "--noplots") == 0
    assert same(load_model(str(whole / "pruned.pt")), load_model(str(place / "runs" / "planned" / "pruned.pt")))

    before, content = (parts / "candidates.json").read_bytes(), json.loads((parts / "candidates.json").read_text())
    capfd.readouterr()
    others = ((["--target-flops", "0.6"], "is a search with another target-flops: "),
              ([*search, "--seed", "1"], "is a search with another seed and data: "),
              ([*search, "--imgsz", "96"], "holds a comparison with --imgsz 64: "))
    for flags, line in others:
        assert run(place, *flags, "--candidates", "4", "--name", "parts", "--exist-ok") == 2
        assert line in capfd.readouterr().err and (parts / "candidates.json").read_bytes() == before
    content["candidates"][0]["plan"]["model.0.conv.weight"] = 17
    (parts / "candidates.json").write_text(json.dumps(content))
    assert run(place, *search, "--candidates", "4", "--name", "parts", "--exist-ok") == 2
    assert "candidates.json: channels of model.0.conv.weight: 17 is not between 1 and 16" in capfd.readouterr().err


def test_another_comparisons_folder_is_refused_before_anything_is_replaced(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "l1", "--ratio", "0.5", "--name", "kept", "--noplots"]
    assert run(place, *flags) == 0
    before = (place / "runs" / "kept" / "pruned.pt").read_bytes()
    assert run(place, *flags, "--ratio", "0.3", "--imgsz", "96", "--exist-ok") == 2
    assert "holds a comparison with --imgsz 64" in capfd.readouterr().err and (place / "runs" / "kept" / "pruned.pt").read_bytes() == before


def test_without_a_search_nothing_is_scored_on(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    split = picture_split(tmp_path, [(64, 64)] * 9)
    for method, plan, calib, images in (("l1", "", 128, 9), ("l1", "", 8, 8), ("eagleeye", "plan.yaml", 128, 8)):
        slices = open_slices(split, PruneConfig(method=method, plan=plan, calib=calib), 64, 32)
        assert sum(map(len, slices.estimation)) == images and not slices.held_out
    assert capfd.readouterr().out == ""
    with pytest.raises(UserError, match="its 9 training images are too few to re-estimate batch norms on some and score on others: 16 is the least"):
        open_slices(split, PruneConfig(data="few.yaml"), 64, 32)
    with pytest.raises(UserError, match="its 7 training images are too few to re-estimate batch norms on: 8 is the least; without --data"):
        open_slices(split.take(range(7)), PruneConfig(method="l1", data="few.yaml"), 64, 32)


def test_norms_are_estimated_on_what_a_training_sees(tmp_path: Path) -> None:
    split = picture_split(tmp_path, [(64, 48)] * 20)
    batches = open_slices(split, PruneConfig(method="l1", calib=20), 64, 32).estimation
    assert [tuple(batch.shape) for batch in batches] == [(10, 3, 64, 64)] * 2
    own = open_slices(split, PruneConfig(method="l1", calib=20), 64, 32).estimation_split
    trained = TrainDataset(own, 64, Hyp(), ImageCache(scaled_sizes(own, 64), "none", 0))
    torch.testing.assert_close(torch.cat(batches)[3], torch.from_numpy(trained[0, 3].image.copy()).permute(2, 0, 1))


def test_slimming_from_training_to_what_is_left(place: Path) -> None:
    training = ["--weights", str(place / "tiny.pt"), "--data", str(place / "tiny_data.yaml"), "--imgsz", "64", "--epochs", "2",
                "--batch-size", "4", "--device", "cpu", "--precision", "fp32", "--workers", "0", "--noplots", "--project", str(place / "train")]
    assert train.main([*training, "--name", "slim", "--slim", "0.05"]) == 0
    weights = place / "train" / "slim" / "weights" / "best.pt"
    assert run(place, "--method", "slimming", "--ratio", "0.4", "--name", "slim", "--noplots", weights=weights) == 0
    whole, left = load_model(str(weights)), load_model(str(place / "runs" / "slim" / "pruned.pt"))
    scales = [layer.bn.weight.abs() for layer in whole.model[:-1]]
    threshold = torch.cat(scales).sort().values[round(0.4 * 80)]
    assert sum(len(layer.bn.weight) for layer in left.model[:-1]) < 60
    for own, layer in zip(scales, left.model[:-1], strict=True):
        count = int((own >= threshold).sum())
        assert max(2, count // 2 * 2) <= layer.conv.out_channels <= count + 1  # --round-to 2
        stay = own.topk(layer.conv.out_channels).indices.sort().values
        torch.testing.assert_close(layer.bn.weight.abs(), own[stay], rtol=1e-3, atol=1e-4)  # fp16


@pytest.mark.parametrize(("method", "first"), [("eagleeye", 0), ("l1", 0), ("sfp", 1), ("fpgm", 2), ("slimming", 3)])
def test_each_method_would_remove_another_filter(method: str, first: int) -> None:
    """The least by L1, by L2, the nearest to all others, and the one of the smallest scale."""
    net = Net(lambda n, x: n.b(n.norm(n.a(x))), a=conv(3, 4, bias=False), norm=nn.BatchNorm2d(4), b=conv(4, 2))
    with torch.no_grad():
        net.a.weight[:, :, 0, 0] = torch.tensor([[6.0, 0, 0], [2.5, 2.5, 2.5], [4, 4, 0.5], [5, 6, -3]])
        net.norm.weight[:] = torch.tensor([1.0, 0.9, 0.8, 0.1])
    graph = graph_of(net)
    given = {"target_flops": 0.9, "data": "a.yaml"} if method == "eagleeye" else {"ratio": 0.25}
    pruning = Pruning(PruneConfig(weights="a.pt", method=method, round_to=1, **given), net, graph, remove_channels, None, lambda keep: 1.0)
    assert pruning.scores["a.weight"].argmin() == first
    if method in ("sfp", "fpgm"):
        soft = build_sparsity(TrainConfig(soft_prune=method, soft_ratio=0.25), graph, net).soft_pruning
        soft(net, copy.deepcopy(net))
        assert (net.a.weight.flatten(1).norm(dim=1) == 0).nonzero().flatten().tolist() == [first]


def test_candidates_are_scored_with_norms_of_their_own_on_images_held_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def score(pruning: Pruning, model: DetectionModel) -> float:
        seen.append((pruning, copy.deepcopy(model)))
        return 0.1 * len(seen)

    monkeypatch.setattr(Pruning, "score", score)
    assert run(place, "--target-flops", "0.5", "--candidates", "6", "--name", "scored", "--noplots") == 0
    assert len(seen) == 6 and len(list((place / "runs" / "scored" / "plans").iterdir())) == 5, "the five best"
    for pruning, model in seen[:2]:
        slices = pruning.slices
        own, held = set(slices.estimation_split.images), set(slices.held_out_split.images)
        assert len(own) == len(held) == 10 == sum(len(batch.images) for batch in slices.held_out) and not own & held
        assert sum(map(len, slices.estimation)) == 10
        by_hand = copy.deepcopy(model)
        for norm in (m for m in by_hand.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
        reestimate_norms(by_hand, (to_input(images, CPU) for images in slices.estimation))
        assert same(by_hand, model), "the statistics are of the pruned network"


@pytest.mark.parametrize(("flags", "line"), [
    (["--method", "l1", "--candidates", "50", "--ratio", "0.5"], "--candidates: is of eagleeye's search, and --method l1 tries nothing"),
    (["--method", "fpgm", "--held-out", "4", "--ratio", "0.5"], "--held-out: is of eagleeye's search"),
    (["--method", "l1", "--ratio", "0.5", "--calib", "64"], "--calib: batch norms are re-estimated on training images: name them with --data"),
    (["--method", "l1", "--ratio", "0.05"], "--ratio 0.05: removes no channel: at least --min-ratio 0.1 of a layer stays, rounded to multiples of 2"),
])
def test_settings_that_would_do_nothing(flags: list[str], line: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(place, *flags, "--name", "nothing", "--noplots", data=False) == 2
    assert line in capfd.readouterr().err and not (place / "runs" / "nothing").exists()


def test_a_ratio_that_is_not_met_is_told(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--method", "l1", "--ratio", "0.97", "--name", "most", "--noplots", data=False) == 0
    assert "--ratio 0.97: 0.88 of the channels go with this --min-ratio and --round-to" in capfd.readouterr().err


def test_a_latency_that_cannot_be_reached(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("models.prune.latency_share", lambda *_: lambda keep: 0.8 + 0.2 * keep.mean())
    for method in ("l1", "eagleeye"):
        assert run(place, "--method", method, "--target-latency", "0.5", "--name", f"latency-{method}", "--noplots") == 2
        assert re.search(r"--target-latency 0.5: can't be reached: 0\.8\d is the nearest .*, as measured now", capfd.readouterr().err)
        assert not (place / "runs" / f"latency-{method}").exists()
    kept = place / "runs" / "earlier" / "comparison" / "runs" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert run(place, "--method", "eagleeye", "--target-latency", "0.5", "--name", "earlier", "--noplots", "--exist-ok") == 2
    assert "can't be reached" in capfd.readouterr().err and kept.exists(), "was there before"


def test_a_search_by_latency_goes_on_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the clock: the share of channels that stay, and a little more each time that it is asked."""
    asked = []

    def latency_share(*_):
        return lambda keep: asked.append(keep) or keep.mean() + 1e-4 * len(asked)

    monkeypatch.setattr("models.prune.latency_share", latency_share)
    search = ["--target-latency", "0.7", "--name", "latency", "--noplots"]
    assert run(place, *search, "--candidates", "1") == 0
    count, file = len(asked), place / "runs" / "latency" / "candidates.json"
    before = json.loads(file.read_text())["measured"]
    assert run(place, *search, "--candidates", "2", "--exist-ok") == 0
    content = json.loads(file.read_text())
    assert before.items() <= content["measured"].items() and "latency of 0" in before
    assert count > 2 and len(asked) == count + len(content["measured"]) - len(before)  # what is new
    assert all(candidate["costs"]["flops"] <= content["measured"]["flops"] < 0.7 for candidate in content["candidates"])


def test_the_first_plan_is_the_one_that_was_fast_enough(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr("utils.compress.pruning.Pruning._fast_enough", lambda self, best, *_: chosen.append(best[2]) or best[2])
    monkeypatch.setattr("models.prune.latency_share", lambda *_: lambda keep: keep.mean())
    assert run(place, "--target-latency", "0.7", "--name", "fast", "--noplots", "--candidates", "3", "--round-to", "1") == 0
    folder = place / "runs" / "fast"
    plans = [read_yaml(folder / "plans" / f"{n}.yaml") for n in (1, 2, 3)]
    assert plans[0]["candidate"] == chosen[0].number and plans[0]["score"] <= plans[2]["score"] <= plans[1]["score"]
    assert run(place, "--plan", str(folder / "plans" / "1.yaml"), "--name", "first-plan", "--noplots") == 0
    assert same(*(load_model(str(place / "runs" / name / "pruned.pt")) for name in ("fast", "first-plan")))


def test_batches_that_estimate_are_of_one_size() -> None:
    assert [_even(n) for n in (1, 16, 17, 102, 128)] == [1, 16, 9, 15, 16]


def test_what_it_wrote_goes_on_to_every_script(place: Path) -> None:
    flags = ["--device", "cpu", "--precision", "fp32"]
    data = ["--data", str(place / "tiny_data.yaml"), "--workers", "0", "--noplots", "--imgsz", "64"]
    assert run(place, "--method", "l1", "--target-params", "0.5", "--name", "first", "--noplots") == 0
    pruned = place / "runs" / "first" / "pruned.pt"
    widths = load_checkpoint(pruned).spec["widths"]
    assert torch.load(pruned, weights_only=True)["spec"]["widths"] == widths
    assert val.main(["--weights", str(pruned), *data, *flags, "--project", str(place / "val")]) == 0
    assert detect.main(["--weights", str(pruned), "--source", str(place / "images" / "val"), *flags, "--project", str(place / "detect")]) == 0
    both = [str(place / "tiny.pt"), str(pruned)]
    assert compare.main(["--weights", *both, *data, *flags, "--runtimes", "PyTorch fp32", "--project", str(place / "compare")]) == 0
    training = [*data, *flags, "--batch-size", "8", "--epochs", "1", "--project", str(place / "train")]
    assert train.main(["--weights", str(pruned), *(word for word in training if word not in ("--imgsz", "64")), "--name", "tuned"]) == 0
    weights = place / "train" / "tuned" / "weights"
    settings = load_checkpoint(weights / "last.pt").training
    assert Hyp(**settings["hyp"]) == load_hyp("hyp.finetune.yaml") != Hyp() and settings["config"]["imgsz"] == 64  # of what was pruned
    assert train.main(["--resume", str(weights / "last.pt"), "--epochs", "2"]) == 0
    assert load_checkpoint(weights / "best.pt").spec["widths"] == widths
    assert train.main(["--cfg", str(pruned.with_suffix(".yaml")), *training, "--name", "scratch"]) == 0
    scratch, tuned = (load_model(str(place / "train" / name / "weights" / "best.pt")) for name in ("scratch", "tuned"))
    assert [p.shape for p in scratch.parameters()] == [p.shape for p in tuned.parameters()]
    assert export.main(["--weights", str(weights / "best.pt"), "--imgsz", "64"]) == 0
    assert detect.main(["--weights", str(weights / "best.onnx"), "--source", str(place / "images" / "val"), "--project", str(place / "detect")]) == 0
    assert run(place, "--method", "l1", "--target-params", "0.5", "--name", "again", "--noplots", weights=weights / "best.pt") == 0
    again = place / "runs" / "again" / "pruned.pt"
    sizes = [sum(p.numel() for p in load_model(str(path)).parameters()) for path in (place / "tiny.pt", pruned, again)]
    assert sizes[1] < 0.51 * sizes[0] and sizes[2] < 0.51 * sizes[1]


def test_a_plugins_network(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = str(ROOT / "docs" / "examples" / "my_blocks.py")
    load_plugin(plugin)
    save(tmp_path / "mine.pt", lived_in(DetectionModel(load_spec(ROOT / "docs" / "examples" / "my_network.yaml", 2), NAMES)))
    flags = ["--method", "l1", "--target-flops", "0.8", "--noplots"]
    assert run(tmp_path, *flags, "--plugin", plugin, weights="mine.pt", data=False) == 0
    assert "kept whole, as what these layers do needs every channel that they see: " in capfd.readouterr().out
    assert load_model(str(tmp_path / "runs" / "exp" / "pruned.pt")).spec.widths
    monkeypatch.delitem(registry._BLOCKS, "FasterBlock")  # as a process that has not seen the plugin
    assert run(tmp_path, *flags, weights="mine.pt", data=False) == 2
    assert "unknown module FasterBlock" in capfd.readouterr().err


@pytest.mark.slow
def test_yolov5_weights(shared: Path, tmp_path: Path) -> None:
    weights = shared / "weights" / "yolov5n.pt"
    before = weights.read_bytes()
    assert run(tmp_path, "--method", "fpgm", "--target-flops", "0.7", "--round-to", "8", "--noplots", weights=weights, data=False) == 0
    left = load_model(str(tmp_path / "runs" / "exp" / "pruned.pt"))
    assert 0.68 < count_gflops(left) / count_gflops(load_model(str(weights))) <= 0.705 and len(left.names) == 80
    assert weights.read_bytes() == before


# what it refuses


@pytest.mark.parametrize(("flags", "line"), [
    ([], "say how far to go by one flag, such as --target-flops 0.5"), (["--target-flops", "0"], "say how far to go"),
    (["--target-flops", "0.5", "--ratio", "0.3"], "say how far to go by one flag, not by --target-flops and --ratio"),
    (["--ratio", "0.3"], "--ratio says nothing to --method eagleeye"), (["--ratio", "1"], "--ratio 1.0: must be at least 0 and below 1"),
    (["--ratio", "-0.1"], "--ratio -0.1: must be at least 0 and below 1"), (["--ratio", "nan"], "--ratio nan: must be a finite number"),
    (["--target-flops", "1"], "--target-flops 1.0: must be"), (["--target-params", "inf"], "--target-params inf: must be a finite number"),
    (["--target-latency", "half"], "invalid float"), (["--target-flops", "0.5", "--min-ratio", "2"], "--min-ratio 2.0: must be"),
    (["--target-flops", "0.5", "--candidates", "0"], "--candidates 0: "), (["--target-flops", "0.5", "--calib", "7"], "--calib 7: must be 8"),
    (["--target-flops", "0.5", "--round-to", "0"], "--round-to 0: "), (["--target-flops", "0.5", "--method", "l3"], "invalid choice: 'l3'"),
    (["--target-flops", "0.5", "--data", ""], "--method eagleeye scores its plans on training images: name them with --data"),
    (["--target-flops", "0.001"], r"--target-flops 0.001: can't be reached: 0.063 is the nearest that can be"),
    (["--target-params", "0.02", "--method", "slimming"], r"--target-params 0.02: can't be reached: 0."),
    (["--target-flops", "0.5", "--weights", "none.pt"], "none.pt: no such weights file"),
    (["--target-flops", "0.5", "--weights", "best.onnx"], "best.onnx: is exported, perhaps int8 already: name the checkpoint"),
    (["--target-flops", "0.5", "--data", "none.yaml"], "none.yaml: no such data YAML"),
    (["--plan", "none.yaml"], "none.yaml: can't be read"), (["--target-flops", "0.5", "--name", ".."], "--name ..: must be a folder's name"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_refusals(place: Path, capfd: pytest.CaptureFixture[str], flags: list[str], line: str) -> None:
    refused(place, capfd, flags, line)


def refused(place: Path, capfd: pytest.CaptureFixture[str], flags: list[str], line: str) -> None:
    def files() -> list[Path]:
        return sorted(path for path in place.rglob("*") if ".light-yolo" not in path.parts)  # the label cache

    before = files()
    capfd.readouterr()
    assert run(place, *flags) == 2
    errors = [text for text in capfd.readouterr().err.splitlines() if "rror" in text or "Traceback" in text]
    assert len(errors) == 1 and errors[0].startswith("error: ") and line in errors[0], errors
    assert files() == before


@pytest.mark.parametrize(("plan", "line"), [
    ({}, "is no plan for this network: it needs 'channels:' with a number for each of its 5 groups"), ({"channels": [8] * 5}, "is no plan"),
    ({"channels": {"model.0.conv.weight": 8}}, "is no plan"), ({4: 17}, "channels of model.4.conv.weight: 17 is not between 1 and 16"),
    ({4: 0}, "0 is not between 1 and 16"), ({4: 8.0}, "8.0 is not between"), ({4: True}, "True is not between"), ({4: "8"}, "'8' is not between"),
], ids=str)  # fmt: skip
def test_plans_that_are_none(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], plan: dict, line: str) -> None:
    if plan.keys() == {4}:
        plan = {"channels": {f"model.{n}.conv.weight": plan.get(n, 8) for n in range(5)}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    refused(place, capfd, ["--plan", str(tmp_path / "plan.yaml")], line)


def test_data_that_does_not_do(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = data_yaml(tmp_path / "few", train=15)
    refused(place, capfd, ["--target-flops", "0.5", "--data", str(few)], "its 15 training images are too few")
    other = tmp_path / "few" / "other.yaml"
    other.write_text(few.read_text().replace("green", "blue\n- green"))
    refused(place, capfd, ["--target-flops", "0.5", "--data", str(other)], "classes")
    other.write_text("\n".join(row for row in few.read_text().splitlines() if not row.startswith("val")))
    refused(place, capfd, ["--target-flops", "0.5", "--data", str(other)], "has no val: entry")


def test_slimming_needs_a_norm(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(model_yaml(tmp_path, width=16).read_text())
    content["backbone"] = [[-1, 1, "nn.Conv2d", [16, 3, 2, 1]]] * 5
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(content))
    save(tmp_path / "bare.pt", DetectionModel(load_spec(tmp_path / "bare.yaml", 2), NAMES))
    refused(place, capfd, ["--method", "slimming", "--ratio", "0.3", "--weights", str(tmp_path / "bare.pt")], "no removable channel passes one")
    assert run(tmp_path, "--method", "l1", "--ratio", "0.3", "--noplots", weights="bare.pt", data=False) == 0
    spec = load_spec(tmp_path / "runs" / "exp" / "pruned.yaml", 2)
    assert spec.widths == load_model(str(tmp_path / "runs" / "exp" / "pruned.pt")).spec.widths and "0" in spec.widths


def test_weights_that_are_no_numbers(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(str(place / "tiny.pt"))
    model.state_dict()["model.1.conv.weight"][3] = torch.nan
    save(tmp_path / "diverged.pt", model)
    refused(place, capfd, ["--method", "l1", "--ratio", "0.3", "--weights", str(tmp_path / "diverged.pt")],
            "diverged.pt: model.1.conv.weight holds NaN or infinity: take an earlier checkpoint")


def test_a_plan_names_the_images_that_its_norms_saw(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--target-flops", "0.5", "--candidates", "2", "--seed", "3", "--calib", "9", "--name", "drawn", "--noplots") == 0
    plan = str(place / "runs" / "drawn" / "plans" / "1.yaml")
    refused(place, capfd, ["--plan", plan, "--seed", "3"], "1.yaml: was scored with --calib 9: repeat these")
    assert run(place, "--plan", plan, "--seed", "3", "--calib", "9", "--name", "redrawn", "--noplots") == 0
    assert same(*(load_model(str(place / "runs" / name / "pruned.pt")) for name in ("drawn", "redrawn")))


def test_the_report_counts_what_stayed(tmp_path: Path) -> None:
    """Where a plan would leave a layer without a channel, one more stays than it says."""
    whole = lived_in(DetectionModel(load_spec("yolov5s-shuffle.yaml", 2), NAMES))
    save(tmp_path / "whole.pt", whole)
    flags = ["--method", "l1", "--ratio", "0.99", "--min-ratio", "0", "--round-to", "1", "--noplots"]
    assert run(tmp_path, *flags, weights="whole.pt", data=False) == 0
    folder = tmp_path / "runs" / "exp"
    before, after = whole.state_dict(), load_model(str(folder / "pruned.pt")).state_dict()
    with open(folder / "widths.csv", newline="") as file:
        told = {f"model.{row['layer']}.weight": row for row in csv.DictReader(file) if not row["kept"]}
    own = {key: row for key, row in told.items() if len(before[key]) == int(row["channels before"])}  # each of its channels is one of the group's
    assert {int(row["channels after"]) for row in own.values()} == {1, 2}
    assert {key: len(after[key]) for key in own} == {key: int(row["channels after"]) for key, row in own.items()}


def test_weights_are_not_overwritten(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--method", "l1", "--ratio", "0.2", "--noplots", "--project", str(tmp_path), data=False) == 0
    weights = tmp_path / "exp" / "pruned.pt"
    before = weights.read_bytes()
    flags = ["--method", "l1", "--ratio", "0.2", "--project", str(tmp_path), "--weights", str(weights)]
    refused(place, capfd, [*flags, "--exist-ok"], "would be overwritten by what is left of it: give another --name")
    assert weights.read_bytes() == before


# every network


CHILD = """
import sys, torch
from models.yolo import load_model
torch.set_num_threads(1)
weights, images, outputs = sys.argv[1:]
assert torch.load(weights, weights_only=True)["spec"]["widths"]
with torch.no_grad():
    torch.save(load_model(weights)(torch.load(images)), outputs)
"""


def whole_path(name: str, folder: Path) -> None:
    """Prune, save, load in a new process, a training step, val, ONNX: the same outputs all the way."""
    torch.manual_seed(0)
    whole = lived_in(DetectionModel(load_spec(f"{name}.yaml", 2), NAMES))
    side = max(256, 2 * whole.max_stride)
    graph = channel_graph(whole, side)
    scores = l1(graph, whole.state_dict())
    plan = meet(random_shares(graph, Limits(0.1, 4), np.random.default_rng(0)), macs_share(graph, scores), 0.6)
    left = remove_channels(whole, graph, best_of(graph, plan, scores))
    assert count_gflops(left, side) / count_gflops(whole, side) == pytest.approx(macs_share(graph, scores)(plan), abs=0.01)

    save_pruned(folder / "pruned.pt", left, side)
    left.load_state_dict(cast_floats(cast_floats(left.state_dict(), torch.float16), torch.float32))  # as a file has them
    images = torch.rand(1, 3, 2 * whole.max_stride, 2 * whole.max_stride)
    torch.save(images, folder / "images.pt")
    with torch.no_grad():
        wanted = left(images)
    subprocess.run([sys.executable, "-c", CHILD, *(str(folder / file) for file in ("pruned.pt", "images.pt", "outputs.pt"))], cwd=ROOT, check=True)
    assert_same(torch.load(folder / "outputs.pt"), wanted, 1e-5)

    model, transfer = build_for_training("", str(folder / "pruned.pt"), (*NAMES, "blue"))  # other classes are welcome
    assert len(transfer.left) == 2 * len(model.strides) and all(".m." in key for key in transfer.left)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss = DetectionLoss(model.head.anchors, 3, Hyp(), side)(model.train()(torch.rand(2, 3, side, side)), torch.tensor([[0, 2, 0.5, 0.5, 0.3, 0.4]]))
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    optimizer.step()

    network = load_model(str(folder / "pruned.pt")).fused()
    split = picture_split(folder, [(64, 64), (64, 48)])
    result = validate(network, val_loader(split, side, 2, model.pad_stride, 0, CPU), split, CPU, torch.float32)
    assert len(result.truths) == 2
    runtime = next(runtime for runtime in RUNTIMES if runtime.name == "ONNX Runtime")
    if missing := runtime.missing(asked=True):
        pytest.skip(missing)
    assert_same(runtime.prepare(network, images)(), wanted, 1e-3)


def assert_same(found: list[Tensor], wanted: list[Tensor], share: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=share, atol=share * float(b.abs().max()))


@pytest.mark.parametrize("name", LIGHT)
def test_the_whole_path_light(name: str, tmp_path: Path) -> None:
    whole_path(name, tmp_path)
    assert_exports(tmp_path / "pruned.pt", "onnx", "openvino", "ncnn")


def assert_exports(weights: Path, *kinds: str) -> None:
    """Each file proves itself."""
    there = [kind for kind in kinds if not FORMATS[kind].missing()]
    assert export.main(["--weights", str(weights), "--include", *there, "--imgsz", "128"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_whole_path(path: Path, tmp_path: Path) -> None:
    whole_path(path.stem, tmp_path)
    is_light = path.parent.name == "models" and path.stem not in ("yolov5l", "yolov5x")
    assert_exports(tmp_path / "pruned.pt", "onnx", "openvino", *["ncnn"] * is_light)
