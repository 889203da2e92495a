"""Quantization-aware fine-tuning: what it computes, that it learns, goes on after an interruption, and what its checkpoint is good for."""
from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from tiny import NAMES, data_yaml, lively, model_yaml, picture_split, tiny_model
from torch import Tensor, nn
from transplant import lived_in

import export
import prune
import quantize
import train
import val
from models.spec import load_spec
from models.yolo import DetectionModel, load_model
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.compress import quantization
from utils.compress.calibration import CalibrationImages
from utils.compress.int8 import Int8Files, int8_format
from utils.compress.rounding import measure_ranges, rounded
from utils.distributed import World
from utils.errors import UserError
from utils.export.backends import open_network
from utils.export.formats import ExportJob
from utils.export.metadata import ExportMetadata
from utils.files import ROOT
from utils.hyp import Hyp
from utils.training import fit
from utils.training.loss import DetectionLoss
from utils.training.memory import _OVERHEAD, step_memory
from utils.training.qat import QuantizationAware
from utils.training.runs import new_run
from utils.training.state import unpack_rows
from utils.training.stepper import Stepper

SIDE = 64
LIGHT = ["yolov5n", "yolov5n-ghost", "yolov5s-shuffle"]
FILES = sorted(path.stem for path in ROOT.glob("models/**/*.yaml"))


class Pictures:
    """Patterns in place of calibration images."""

    def __init__(self, side: int = SIDE, count: int = 4) -> None:
        noise = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(2))
        self.images = nn.functional.interpolate(noise, scale_factor=8)

    def __iter__(self):
        return iter(image[None].numpy() for image in self.images)


def aware(network: DetectionModel, side: int = SIDE) -> QuantizationAware:
    learner = QuantizationAware(network, Pictures(side))
    learner.calibrate(network.eval(), World())
    return learner


# --- what it computes ----------------------------------------------------------------------------------------------------------------------


def test_training_computes_what_validation_does(tmp_path: Path):
    network = lived_in(tiny_model(tmp_path, width=16)).folded()
    learner, images = aware(network), Pictures().images
    ranges = measure_ranges(network, [images])
    assert learner.ranges.keys() == ranges.keys() and len(ranges) == 8
    for name, seen in ranges.items():
        assert [float(value) for value in learner.ranges[name]] == pytest.approx([float(value) for value in seen], rel=1e-4)
    with torch.no_grad():
        trained, scored, exact = learner(images), rounded(network, learner.ranges)(images), network(images)
    for a, b, c in zip(trained, scored, exact, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.allclose(a, c, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in network.modules()) and learner.head is network.head


def test_gradients_reach_the_networks_own_weights(tmp_path: Path):
    """Those of the rounded network, as if nothing had been rounded."""
    network = lived_in(tiny_model(tmp_path, width=16)).folded()
    learner, images = aware(network), Pictures().images
    twin = rounded(network, learner.ranges)
    for maps in (learner(images), twin(images)):
        sum(raw.square().sum() for raw in maps).backward()
    for (name, own), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=lambda text, name=name: f"{name} {text}")
    assert dict(learner.named_parameters()).keys() == {f"network.{name}" for name, _ in network.named_parameters()}


def test_norms_that_are_left_stay_as_they_are(tmp_path: Path):
    """A batch norm that follows no convolution, as in front of one, can't be folded."""
    content = yaml.safe_load(model_yaml(tmp_path).read_text())
    content["backbone"][4] = [-1, 1, "nn.BatchNorm2d", [8]]
    (tmp_path / "left.yaml").write_text(yaml.safe_dump(content))
    network = lived_in(DetectionModel(load_spec(tmp_path / "left.yaml", 2), NAMES)).folded()
    norm = network.model[4]
    assert isinstance(norm, nn.BatchNorm2d)
    before = norm.running_mean.clone()
    learner = aware(network)
    sum(raw.sum() for raw in learner.train()(Pictures().images)).backward()
    assert torch.equal(norm.running_mean, before) and norm.weight.grad is not None


def a_step(name: str, side: int) -> None:
    torch.manual_seed(0)
    network = lived_in(DetectionModel(load_spec(f"{name}.yaml", 2), NAMES)).folded()
    learner = aware(network, side)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    loss = DetectionLoss(network.head.anchors, 2, Hyp(), side)(learner.train()(Pictures(side, 2).images), torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4]]))
    loss.total.backward()
    assert loss.parts.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    before = [p.detach().clone() for p in network.parameters()]
    optimizer.step()
    assert sum(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)) > 0.8 * len(before)


@pytest.mark.parametrize("name", LIGHT)
def test_light_networks_train_a_step(name: str):
    a_step(name, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_network_trains_a_step(name: str):
    a_step(name, 256)


# --- a run ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and the weights of a network for it."""
    place = tmp_path_factory.mktemp("qat")
    data_yaml(place, train=10)
    model = lively(tiny_model(place, width=16))
    torch.set_num_threads(1)
    start = lived_in(tiny_model(place, width=16))
    start.head.load_state_dict(model.head.state_dict())
    save_checkpoint(place / "best.pt", Checkpoint(start.spec.to_dict(), NAMES, dict(start.state_dict()), imgsz=SIDE))
    return place


def flags(place: Path, name: str, *extra: str) -> list[str]:
    return ["--weights", str(place / "best.pt"), "--qat", "--data", str(place / "tiny_data.yaml"), "--epochs", "2", "--batch-size", "4",
            "--device", "cpu", "--workers", "0", "--noplots", "--project", str(place / "runs"), "--name", name, *extra]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run that nothing interrupted."""
    torch.set_num_threads(1)
    assert train.main(flags(place, "whole", "--save-period", "1")) == 0
    return place / "runs" / "whole"


def test_a_run(place: Path, whole: Path):
    rows = list(csv.DictReader((whole / "results.csv").open()))
    assert len(rows) == 2 and float(rows[0]["train/box_loss"]) > 0 and float(rows[0]["x/lr1"]) == 0.0005
    opt = yaml.safe_load((whole / "opt.yaml").read_text())
    assert (opt["imgsz"], opt["precision"], opt["noautoanchor"], opt["hyp"]) == (SIDE, "fp32", True, "hyp.qat.yaml")
    best, last = (load_checkpoint(whole / "weights" / name) for name in ("best.pt", "last.pt"))
    kept = load_checkpoint(whole / "weights" / "epoch2.pt").state_dict
    assert {value.dtype for value in kept.values() if value.is_floating_point()} == {torch.float32}  # fp16 would be other steps
    assert {t.dtype for t in best.state_dict.values() if t.is_floating_point()} == {torch.float32}, "fp16 would round anew"
    assert best.spec["fused"] is True and best.spec == last.spec and best.imgsz == SIDE
    assert not any("bn" in key for key in best.state_dict) and "model.0.conv.bias" in best.state_dict
    started = load_model(str(place / "best.pt")).folded().state_dict()
    assert all((last.state_dict[key] - started[key]).abs().max() > 0 for key in started if "anchors" not in key)
    network = load_model(str(whole / "weights" / "best.pt"))
    assert network.spec.fused and network.fused().state_dict().keys() == network.state_dict().keys()


def test_a_run_trains_and_scores_what_int8_computes(place: Path, monkeypatch: pytest.MonkeyPatch):
    trained, scored = [], []
    forward, validated = QuantizationAware.forward, fit.validate
    monkeypatch.setattr(QuantizationAware, "forward", lambda self, images: trained.append(len(self.ranges)) or forward(self, images))
    monkeypatch.setattr(fit, "validate", lambda network, *args, **named: scored.append(network) or validated(network, *args, **named))
    assert train.main(flags(place, "seen")) == 0
    assert trained == [8] * 8, "what takes memory, twice, then two epochs of three batches: eight layers rounded"
    rounding = [[name for name, module in network.named_modules() if module._forward_pre_hooks] for network in scored]
    assert len(scored) == 3 and all(len(names) == 8 for names in rounding), "after each epoch, and best.pt in the end"


def test_memory_is_that_of_rounding():
    network = lived_in(DetectionModel(load_spec("yolov5n.yaml", 2))).folded()
    plain, rounding = (step_memory(model, SIDE, torch.device("cpu")).image for model in (network, QuantizationAware.with_any_range(network)))
    learner, kept = aware(network).train(), []
    for images in (2, 3):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
            learner(torch.rand(images, 3, SIDE, SIDE))
        kept.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
    assert rounding > 1.25 * plain and rounding / (kept[1] - kept[0]) == pytest.approx(_OVERHEAD, rel=0.1), "but for the maps that it puts out"


def test_what_the_flag_alone_does(place: Path):
    def config(**given: object):
        return new_run({"weights": str(place / "best.pt"), "qat": True, "data": str(place / "tiny_data.yaml"), **given}).config

    alone = config()
    assert (alone.epochs, alone.imgsz, alone.precision, alone.noautoanchor) == (10, SIDE, "fp32", True)
    run = new_run({"weights": str(place / "best.pt"), "qat": True, "data": str(place / "tiny_data.yaml")})
    assert run.hyp.lr0 < Hyp().lr0 / 10 and run.hyp.warmup_epochs == run.hyp.weight_decay == 0
    assert {f.name for f in dataclasses.fields(Hyp) if getattr(run.hyp, f.name) != getattr(Hyp(), f.name)} == {
        "lr0", "lrf", "weight_decay", "warmup_epochs", "warmup_momentum", "warmup_bias_lr"}
    chosen = config(epochs=3, imgsz=128, precision="bf16", hyp="hyp.scratch.yaml")
    assert (chosen.epochs, chosen.imgsz, chosen.precision, chosen.hyp) == (3, 128, "bf16", "hyp.scratch.yaml")
    assert not new_run({"weights": str(place / "best.pt"), "data": str(place / "tiny_data.yaml")}).config.qat


def differing(a: object, b: object, place: str = "") -> list[str]:
    """Where two trees of tensors and plain data differ in a bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differing(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for n, (x, y) in enumerate(zip(a, b, strict=True)) for found in differing(x, y, f"{place}[{n}]")]
    same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    return [] if same else [place]


@pytest.mark.parametrize("extra", [[], ["--teacher", "--distill-features", "1"]], ids=["alone", "taught"])
def test_interrupted_and_resumed_equals_uninterrupted(place: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]):
    if extra:
        extra = ["--teacher", str(place / "best.pt"), *extra[1:]]
    argv = flags(place, "", *extra, "--epochs", "3")
    names = ("t-whole", "t-parts") if extra else ("a-whole", "a-parts")
    assert train.main([*argv, "--name", names[0]]) == 0
    backward, calls = Stepper.backward, []

    def counting(self: Stepper, *args: object) -> None:
        calls.append(1)
        if len(calls) == 5:  # in the second epoch
            raise KeyboardInterrupt
        backward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "backward", counting)
        assert train.main([*argv, "--name", names[1]]) == 2
    last = [place / "runs" / name / "weights" / "last.pt" for name in names]
    assert load_checkpoint(last[1]).training["epoch"] == 1
    assert train.main(["--resume", str(last[1])]) == 0
    found, wanted = (dataclasses.asdict(load_checkpoint(path)) for path in reversed(last))
    for checkpoint in (found, wanted):
        state = checkpoint["training"]
        state["history"] = [{k: v for k, v in row.items() if k != "time_s"} for row in unpack_rows(state["history"])]
        for key in ("name", "resume"):
            del state["config"][key]
        del state["seconds"]
    assert differing(found, wanted) == []
    assert differing(*(dict(load_checkpoint(path.with_name("best.pt")).state_dict) for path in last)) == []


def test_its_checkpoint_goes_on_to_every_script(place: Path, whole: Path, tmp_path: Path):
    best, data = str(whole / "weights" / "best.pt"), ["--data", str(place / "tiny_data.yaml")]
    shared = [*data, "--workers", "0", "--noplots", "--device", "cpu"]
    assert val.main(["--weights", best, *shared, "--project", str(tmp_path)]) == 0
    assert train.main([*flags(place, "again"), "--weights", best, "--epochs", "1"]) == 0  # --qat once more
    assert train.main(["--weights", best, *shared, "--imgsz", "64", "--epochs", "1", "--project", str(tmp_path), "--name", "plain"]) == 0
    assert prune.main(["--weights", best, "--method", "l1", "--ratio", "0.3", "--round-to", "2", "--noplots", "--project", str(tmp_path),
                       "--name", "thin", "--device", "cpu"]) == 0
    made = best, tmp_path / "plain" / "weights" / "best.pt", tmp_path / "thin" / "pruned.pt"
    assert [load_checkpoint(path).int8 for path in made] == [True, False, False]  # whatever comes later is not tuned any more
    left = load_model(str(tmp_path / "thin" / "pruned.pt"))
    assert left.spec.fused and left.spec.widths and left.model[0].conv.out_channels == 12
    assert train.main([*flags(place, "pruned"), "--weights", str(tmp_path / "thin" / "pruned.pt"), "--epochs", "1"]) == 0
    if int8_missing("onnx"):
        return
    assert export.main(["--weights", best, *data]) == 0


# --- the file ------------------------------------------------------------------------------------------------------------------------------


def int8_missing(kind: str) -> str:
    try:
        int8_format(kind)
    except UserError as missing:
        return str(missing)
    return ""


def sqnr_db(reference: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - found).square().sum()))


@pytest.mark.parametrize(("kind", "activation", "block"), [
    ("onnx", "nn.ReLU()", "Conv"), ("openvino", "nn.ReLU()", "Conv"), ("openvino", "nn.SiLU()", "Conv"),
    *((kind, "nn.ReLU()", block) for kind in ("onnx", "openvino") for block in ("DWConvblock", "Shuffle_Block", "DWConv")),
])  # fmt: skip
def test_the_file_computes_what_training_saw(kind: str, activation: str, block: str, tmp_path: Path):
    """Not only nearer to the rounded network than to the float one: it is that network.

    (In ONNX, SiLU's own steps are rounded besides, and the concatenations within blocks: nearer by 6 dB is half the distance.)
    """
    if missing := int8_missing(kind):
        pytest.skip(missing)
    content = yaml.safe_load(model_yaml(tmp_path, width=16).read_text()) | {"activation": activation}
    content["backbone"][3] = [-1, 1, block, [16, 2] if block == "Shuffle_Block" else [16, 3, 2]]
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(content))
    torch.manual_seed(0)
    network = lively(DetectionModel(load_spec(tmp_path / "net.yaml", 2), NAMES)).folded().requires_grad_(False)
    images = CalibrationImages.of(picture_split(tmp_path, [(SIDE, SIDE)] * 12), 12, SIDE)
    pictures = torch.from_numpy(images.first(12))
    ranges = measure_ranges(network, [pictures])
    metadata = ExportMetadata.of(network, (SIDE, SIDE), dynamic=False, precision="fp32", source="tiny.pt")
    files = Int8Files(ExportJob(network, metadata), int8_format(kind), images, tmp_path, ranges)
    file = torch.as_tensor(open_network(files.write(()))(pictures))
    exact, seen = (model.decode(model(pictures))[..., 4:] for model in (network, rounded(network, ranges)))
    far, near = (sqnr_db(reference, file[..., 4:]) for reference in (exact, seen))
    assert far < 50 and near > (60 if block == "Conv" or kind == "openvino" else max(far + 6, 48))


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_quantize_says_that_it_was_fine_tuned(kind: str, place: Path, whole: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    if missing := int8_missing(kind):
        pytest.skip(missing)
    monkeypatch.setattr(quantization, "_ROUNDS", 3)
    argv = ["--weights", str(whole / "weights" / "best.pt"), "--data", str(place / "tiny_data.yaml"), "--workers", "0", "--max-drop", "100"]
    assert quantize.main([*argv, "--to", kind]) == 0
    assert "best.pt (fine-tuned for int8) to" in capsys.readouterr().out


# --- bad input -----------------------------------------------------------------------------------------------------------------------------


def test_other_classes_of_the_same_number(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    own = flags(place, "others")
    data = Path(own[own.index("--data") + 1])
    content = yaml.safe_load(data.read_text())
    (tmp_path / "others.yaml").write_text(yaml.safe_dump(content | {"path": str(data.parent), "names": [f"other {n}" for n in content["names"]]}))
    assert train.main([*own, "--data", str(tmp_path / "others.yaml")]) == 2
    assert "(class 0 is " in capfd.readouterr().err and not (place / "runs" / "others").exists()


@pytest.mark.parametrize(("extra", "line"), [
    (["--weights", ""], "--qat: fine-tunes a trained network: name its checkpoint, --weights"),
    (["--cfg", "yolov5n.yaml"], "--qat: fine-tunes the network of --weights as it is: leave out --cfg"),
    (["--slim", "1e-4"], "--slim: acts on batch norms, and --qat folds them away"),
    (["--soft-prune", "sfp"], "--soft-prune: prepares for prune.py, which comes before --qat"),
    (["--weights", "none.pt"], "none.pt: no such weights file"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_refusals(place: Path, capfd: pytest.CaptureFixture[str], extra: list[str], line: str):
    capfd.readouterr()
    assert train.main([*flags(place, "refused"), *extra]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: ") and line in error and "\n" not in error
    assert not (place / "runs" / "refused").exists()


def test_data_that_does_not_do(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "few").mkdir()
    few = data_yaml(tmp_path / "few", train=7)
    other = tmp_path / "few" / "three.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(few.read_text()) | {"names": ["a", "b", "c"]}))
    for data, line in ((few, "its training split has 7 images, and int8 needs 8"), (other, "best.pt: knows the 2 classes")):
        capfd.readouterr()
        assert train.main([*flags(place, "none"), "--data", str(data)]) == 2
        errors = [text for text in capfd.readouterr().err.splitlines() if "rror" in text]
        assert len(errors) == 1 and line in errors[0], errors
