"""The command line and the hyperparameter files: every flag, every range, one line for each mistake; and --help without PyTorch."""
from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.config import CompareConfig, DetectConfig, ExportConfig, PruneConfig, QuantizeConfig, TrainConfig, ValConfig, for_next, quoted
from utils.data.loader import worker_count
from utils.errors import UserError
from utils.files import ROOT
from utils.flags import parse, parse_given
from utils.hyp import Hyp, hyp_from_dict, load_hyp
from utils.training.runs import _newest_last

REQUIRED = {TrainConfig: [], ValConfig: ["--weights", "a.pt"], DetectConfig: ["--weights", "a.pt", "--source", "b"], CompareConfig: [],
            ExportConfig: ["--weights", "a.pt"], QuantizeConfig: ["--weights", "a.pt", "--data", "b.yaml"],
            PruneConfig: ["--weights", "a.pt"]}
CONFIGS = list(REQUIRED)
FLAGS = [(cls, field) for cls in CONFIGS for field in dataclasses.fields(cls)]

# YOLOv5's own flags, which its users' commands name.
YOLOV5 = {
    TrainConfig: "cfg weights data hyp epochs batch-size batch imgsz img img-size rect resume nosave noval noautoanchor noplots cache image-weights "
    "device multi-scale single-cls optimizer sync-bn workers project name exist-ok cos-lr label-smoothing patience freeze save-period seed precision "
    "time-limit",
    ValConfig: "weights data batch-size batch imgsz img img-size conf-thres iou-thres max-det task device workers single-cls augment verbose "
    "save-txt save-conf save-json project name exist-ok half",
    DetectConfig: "weights source data imgsz img img-size conf-thres iou-thres max-det device view-img save-txt save-csv save-conf save-crop nosave "
    "classes agnostic-nms augment project name exist-ok line-thickness hide-labels hide-conf half vid-stride",
    ExportConfig: "weights data include imgsz img img-size batch-size device half dynamic opset",
}  # fmt: skip


def test_paths_in_commands_that_are_recommended(monkeypatch):
    assert shlex.split(f"{quoted('my run/best.pt')} {quoted(Path('a.pt'))}") == ["my run/best.pt", "a.pt"]
    assert for_next(ExportConfig(plugin="my blocks.py")) == " --plugin 'my blocks.py'"
    monkeypatch.setattr("utils.config.os", SimpleNamespace(name="nt"))
    assert quoted(r"runs\exp\best.pt") == r"runs\exp\best.pt" and quoted(r"my runs\best.pt") == r'"my runs\best.pt"'


def of(cls: type, *argv: str):
    return parse(cls, [*REQUIRED[cls], *argv], "a description")


def example(field: dataclasses.Field) -> tuple[list[str], object]:
    """Words for a flag and the value that they mean."""
    given = field.metadata["argparse"]
    if field.default is False:
        return [], True
    if given.get("choices"):
        return [given["choices"][-1]], given["choices"][-1]
    if given.get("nargs") == "+":
        return ["64", "96"], tuple(map(given["type"], ("64", "96")))
    kind = given.get("type", type(field.default))
    text = {str: "some", int: "64", float: "0.25"}[kind]
    return [text], kind(text)


@pytest.mark.parametrize(("cls", "field"), FLAGS, ids=[f"{cls.__name__}-{field.name}" for cls, field in FLAGS])
def test_every_flag_is_read(cls, field):
    words, value = example(field)
    for flag in (f"--{field.name.replace('_', '-')}", *field.metadata["aliases"]):
        config = of(cls, flag, *words)
        assert getattr(config, field.name) == value and type(getattr(config, field.name)) is type(value)
    assert field.metadata["help"]


@pytest.mark.parametrize("cls", CONFIGS)
def test_defaults_and_what_is_given(cls):
    config = of(cls)
    for field in dataclasses.fields(cls):
        if not field.metadata["argparse"].get("required"):
            assert getattr(config, field.name) == field.default
            check = field.metadata["check"]
            assert field.default is None or not check or check[0](field.default), field.name
    assert set(parse_given(cls, [*REQUIRED[cls], "--imgsz", "64"], "")) == {"imgsz", *(word[2:] for word in REQUIRED[cls] if word.startswith("--"))}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"


@pytest.mark.parametrize("cls", YOLOV5)
def test_yolov5s_flags_are_there(cls):
    known = {field.name.replace("_", "-") for field in dataclasses.fields(cls)}
    known |= {alias.removeprefix("--") for field in dataclasses.fields(cls) for alias in field.metadata["aliases"]}
    assert set(YOLOV5[cls].split()) - known == set()


def test_yolov5s_habits():
    config = of(TrainConfig, "--img", "320", "--batch", "-1", "--epochs=5", "--cache", "--resume", "--freeze", "10")
    assert (config.imgsz, config.batch_size, config.epochs, config.cache, config.resume, config.freeze) == (320, -1, 5, "ram", "newest", (10,))
    assert of(TrainConfig, "--img-size", "96", "--batch-size", "2", "--cos").cos_lr
    assert of(TrainConfig, "--freeze", "0", "1", "2").freeze == (0, 1, 2) and of(TrainConfig, "--resume", "a/last.pt").resume == "a/last.pt"
    assert of(DetectConfig, "--img", "384", "640", "--classes", "0", "2").imgsz == (384, 640)
    assert of(ValConfig, "--conf", ".5", "--iou", "0.7").iou_thres == 0.7
    defaults = of(TrainConfig)
    assert (defaults.data, defaults.epochs, defaults.batch_size, defaults.imgsz, defaults.optimizer) == ("shapes.yaml", 100, 16, 640, "SGD")
    assert (of(ValConfig).conf_thres, of(ValConfig).iou_thres, of(ValConfig).max_det) == (0.001, 0.6, 300)
    assert (of(DetectConfig).conf_thres, of(DetectConfig).iou_thres, of(DetectConfig).max_det) == (0.25, 0.45, 1000)


@pytest.mark.parametrize(("cls", "argv", "words"), [
    (TrainConfig, ["--epochs", "0"], ["--epochs 0", "above 0"]), (TrainConfig, ["--epochs", "x"], ["--epochs", "'x'"]),
    (TrainConfig, ["--epochs", "1.5"], ["--epochs", "'1.5'"]), (TrainConfig, ["--epochs"], ["--epochs", "expected one argument"]),
    (TrainConfig, ["--batch", "0"], ["--batch-size 0", "-1"]), (TrainConfig, ["--batch", "-2"], ["--batch-size -2"]),
    (TrainConfig, ["--img", "31"], ["--imgsz 31", "32 and 8192"]), (TrainConfig, ["--img", "8193"], ["--imgsz 8193"]),
    (TrainConfig, ["--optimizer", "sgd"], ["--optimizer", "SGD", "AdamW"]), (TrainConfig, ["--precision", "fp8"], ["--precision", "bf16"]),
    (TrainConfig, ["--label-smoothing", "1.1"], ["--label-smoothing 1.1"]), (TrainConfig, ["--label-smoothing", "nan"], ["finite"]),
    (TrainConfig, ["--time-limit", "inf"], ["--time-limit inf", "finite"]), (TrainConfig, ["--time-limit", "-1"], ["--time-limit -1"]),
    (TrainConfig, ["--workers", "-1"], ["--workers -1"]), (TrainConfig, ["--patience", "-1"], ["--patience -1"]),
    (TrainConfig, ["--save-period", "0"], ["--save-period 0"]), (TrainConfig, ["--seed", "-1"], ["--seed -1"]),
    (TrainConfig, ["--seed", str(2**64)], ["--seed", "2**32"]), (TrainConfig, ["--freeze", "-1"], ["--freeze -1"]),
    (TrainConfig, ["--freeze"], ["--freeze"]), (TrainConfig, ["--cache", "disc"], ["--cache", "disk"]),
    (TrainConfig, ["--name", ""], ["--name", "folder"]),
    (TrainConfig, ["--name", ".."], ["--name ..", "folder"]), (TrainConfig, ["--epochz", "5"], ["--epochz", "did you mean --epochs"]),
    (TrainConfig, ["--image-size=9"], ["--image-size", "did you mean --img-size"]), (TrainConfig, ["stray"], ["stray"]),
    (TrainConfig, ["--no", "1"], ["--no", "--nosave"]), (ValConfig, ["--conf", "1.1"], ["--conf-thres 1.1"]),
    (ValConfig, ["--iou", "-.1"], ["--iou-thres -0.1"]),
    (ValConfig, ["--max-det", "0"], ["--max-det 0"]), (ValConfig, ["--task", "study"], ["--task", "speed"]),
    (DetectConfig, ["--imgsz", "1", "2"], ["--imgsz 1 2"]), (DetectConfig, ["--imgsz", "64", "64", "64"], ["one or two"]),
    (DetectConfig, ["--classes", "-1"], ["--classes -1"]), (DetectConfig, ["--classes", "x"], ["--classes", "'x'"]),
    (ExportConfig, ["--img", "64", "64", "64"], ["one or two"]), (ExportConfig, ["--batch", "0"], ["--batch-size 0", "above 0"]),
    (DetectConfig, ["--vid-stride", "0"], ["--vid-stride 0"]), (DetectConfig, ["--line-thickness", "-1"], ["--line-thickness -1"]),
])  # fmt: skip
def test_one_line_for_a_mistake(cls, argv, words):
    with pytest.raises(UserError) as raised:
        of(cls, *argv)
    assert [word for word in words if word not in str(raised.value)] == [], raised.value


@pytest.mark.parametrize(("cls", "word"), [(ValConfig, "--weights"), (DetectConfig, "--source"), (ExportConfig, "--weights")])
def test_what_must_be_given(cls, word):
    with pytest.raises(UserError, match=f"required.*{word}"):
        parse(cls, [], "")


def test_workers_are_at_most_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert [worker_count(n) for n in (0, 1, 3, 4, 8)] == [0, 1, 3, 4, 4]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert worker_count(8) == 0


# Hyperparameters


YOLOV5_HYP = dict(lr0=0.01, lrf=0.1, momentum=0.937, weight_decay=0.0005, warmup_epochs=3.0, warmup_momentum=0.8, warmup_bias_lr=0.1, box=0.05,
                  cls=0.3, cls_pw=1.0, obj=0.7, obj_pw=1.0, iou_t=0.20, anchor_t=4.0, fl_gamma=0.0, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, degrees=0.0,
                  translate=0.1, scale=0.9, shear=0.0, perspective=0.0, flipud=0.0, fliplr=0.5, mosaic=1.0, mixup=0.1, copy_paste=0.0,
                  anchors=3)  # fmt: skip


def test_a_hyp_file_of_yolov5s_shape(tmp_path):
    path = tmp_path / "hyp.mine.yaml"
    path.write_text("# Hyperparameters\n" + "".join(f"{key}: {value}  # a comment\n" for key, value in YOLOV5_HYP.items()))
    hyp = load_hyp(str(path))
    assert (hyp.lrf, hyp.cls, hyp.obj, hyp.scale, hyp.mixup) == (0.1, 0.3, 0.7, 0.9, 0.1)
    path.write_text("mosaic: 0\n")
    assert load_hyp(str(path)) == Hyp(mosaic=0.0)


def test_the_shipped_files_are_the_defaults():
    files = sorted((ROOT / "data" / "hyps").glob("*.yaml"))
    assert files
    assert load_hyp("hyp.scratch.yaml") == Hyp()
    assert all(load_hyp(path.name) for path in files)


def test_hyps_as_others_write_them():
    """YAML takes 1e-3 for text; what copies outlines finds none to copy; 0 anchors are those of the model's YAML."""
    assert hyp_from_dict({"lr0": "1e-3", "copy_paste": 0.1, "iou_t": 0.2, "anchors": 0, "fl_gamma": 0.0}, "x") == Hyp(lr0=0.001)


def test_every_default_is_in_its_range():
    assert hyp_from_dict(dataclasses.asdict(Hyp()), "x") == Hyp()
    assert all(field.metadata["help"] for field in dataclasses.fields(Hyp))


@pytest.mark.parametrize(("content", "words"), [
    ({"mosiac": 1.0}, ["mosiac", "unknown key", "did you mean mosaic"]), ({"anchors": 4}, ["anchors", "in the model YAML"]),
    ({"fl_gamma": 1.5}, ["fl_gamma", "set it to 0"]), ({"lr0": "1e-3x"}, ["lr0", "number"]),
    ({"lr0": "0.01"}, ["lr0", "number", "'0.01'"]), ({"lr0": True}, ["lr0", "True"]),
    ({"lr0": 0}, ["lr0", "above 0"]),
    ({"lr0": float("nan")}, ["lr0", "finite"]), ({"lr0": float("inf")}, ["lr0", "finite"]), ({"momentum": 1.5}, ["momentum", "above 0 and below 1"]),
    ({"scale": 1.0}, ["scale", "below 1"]), ({"anchor_t": 1}, ["anchor_t"]), ({"degrees": -1}, ["degrees"]),
    ({"perspective": 0.1}, ["perspective", "0.001"]),
    ({1: 2}, ["1", "unknown key"]), ({"lr0": None}, ["lr0", "None"]), ({"lr0": [1]}, ["lr0", "[1]"]),
])  # fmt: skip
def test_hyps_refused(content, words):
    with pytest.raises(UserError) as raised:
        hyp_from_dict(content, "my.yaml")
    assert str(raised.value).startswith("my.yaml: ") and [word for word in words if word not in str(raised.value)] == [], raised.value


def test_hyp_file_missing():
    with pytest.raises(UserError, match=r"hyp\.scrtch\.yaml: no such hyperparameter YAML; looked at .*data/hyps.*did you mean hyp\.scratch\.yaml"):
        load_hyp("hyp.scrtch.yaml")


def test_newest_run(tmp_path):
    with pytest.raises(UserError, match=r"no weights/last\.pt below .*--resume runs/train/exp/weights/last\.pt"):
        _newest_last(str(tmp_path))
    for n, name in enumerate(("exp2", "exp", "deep/exp3")):
        path = tmp_path / name / "weights" / "last.pt"
        path.parent.mkdir(parents=True)
        path.write_text("")
        os.utime(path, (n, 10 - n))
    assert _newest_last(str(tmp_path)) == tmp_path / "exp2" / "weights" / "last.pt"


# --help


HELP = """
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {{"torch", "numpy", "cv2", "matplotlib", "torchvision", "thop"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(("script", "cls"), [
    ("train.py", TrainConfig), ("val.py", ValConfig), ("detect.py", DetectConfig), ("compare.py", CompareConfig),
    ("export.py", ExportConfig), ("prune.py", PruneConfig), ("quantize.py", QuantizeConfig),
])  # fmt: skip
def test_help_answers_at_once(script, cls):
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", HELP.format(script=str(ROOT / script))], cwd=ROOT, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - start
    print(f"{script} --help: {seconds:.2f} s")
    assert run.returncode == 0, run.stderr
    shown = run.stdout.replace("\n", " ")
    assert [f.name for f in dataclasses.fields(cls) if f"--{f.name.replace('_', '-')}" not in shown] == []
    assert "%" not in shown.replace(" %", "") and "%%" not in shown
    assert seconds < 2  # a loose bound: the machine may be busy


def test_a_mistake_on_the_command_line_costs_no_import():
    code = HELP.replace('"--help"', '"--epochz", "3"').replace("end.code == 0", "end.code == 2").format(script=str(ROOT / "train.py"))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "error: unknown argument --epochz; did you mean --epochs? (--help lists all flags)\n"


@pytest.mark.parametrize(("config", "argv", "says"), [
    (TrainConfig, ["--evolve", "300"], "--evolve: hyperparameters are not evolved here"), (TrainConfig, ["--adam"], "--adam: use --optimizer Adam"),
    (ExportConfig, ["--weights", "a.pt", "--workspace=4"], "--workspace: leave it out"),
    (ValConfig, ["--weights", "a.pt", "b.pt"], "b.pt: belongs to no flag: each takes one value, unless --help shows several"),
])  # fmt: skip
def test_flags_of_the_family_that_are_not_here(config, argv, says):
    with pytest.raises(UserError, match=says):
        of(config, *argv)


def test_what_the_next_command_must_say_too() -> None:
    assert for_next(TrainConfig()) == ""
    assert for_next(PruneConfig(plugin="my.py", data_root="sets", single_cls=True)) == " --plugin my.py --data-root sets --single-cls"
