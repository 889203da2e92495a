"""export.py, and val.py and detect.py on what it wrote: the checkpoint's boxes and mAP, whatever the format."""
from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import data_yaml, label_by, lively, tiny_model
from transplant import sow

import detect
import export
import val
from models.spec import load_spec
from models.weights import OpenWeights, open_weights
from models.yolo import DetectionModel
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.export.backends import open_network

for package in ("onnx", "onnxruntime", "openvino"):
    pytest.importorskip(package)
FILES = {"onnx": "tiny.onnx", "openvino": "tiny_openvino_model", "torchscript": "tiny.torchscript"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """tiny.pt in three folders: alone, beside its static files, beside its dynamic ones; and images whose labels are what it finds in them."""
    place = tmp_path_factory.mktemp("export")
    model = tiny_model(place)
    own = lively(model)
    for conv, better in zip(model.head.m, own.head.m, strict=True):
        conv.load_state_dict(better.state_dict())
    data_yaml(place)
    for name in ("alone", "static", "dynamic"):
        save_checkpoint(place / name / "tiny.pt", Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict()), imgsz=64))
    label_by(place / "alone" / "tiny.pt", place / "images" / "val")
    for name, flags in (("static", ["--batch", "3"]), ("dynamic", ["--dynamic"])):
        assert export.main([*weights(place / name / "tiny.pt"), "--include", *FILES, *flags]) == 0
    return place


def weights(path: Path) -> list[str]:
    return ["--weights", str(path)]


def scores(place: Path, path: Path, *flags: str, capfd) -> np.ndarray:
    """The figures that val.py prints of a file's accuracy, which is some."""
    capfd.readouterr()
    assert val.main([*weights(path), "--data", str(place / "tiny_data.yaml"), "--batch-size", "3", "--device", "cpu", "--workers", "0", "--precision",
                     "fp32", "--noplots", "--project", str(place / "runs"), *flags]) == 0
    found = [line for line in capfd.readouterr().out.splitlines() if re.match(r"\s*(all|red|green|mAP)", line)]
    assert len(found) >= 2 and float(found[0].split()[-1]) > 0.05, found
    return np.array([float(figure) for line in found for figure in re.findall(r"(?<![\w-])\d[\d.]*", line)])


def assert_scores(found: np.ndarray, expected: np.ndarray) -> None:
    """The same, but for what the last digit of a confidence does to the order of boxes."""
    np.testing.assert_allclose(found, expected, atol=2e-3)


def lines(place: Path, path: Path, name: str, *flags: str) -> dict[str, np.ndarray]:
    """What detect.py finds, by image."""
    assert detect.main([*weights(path), "--source", str(place / "images" / "val"), "--project", str(place / "found"), "--name", name, "--device",
                        "cpu", "--precision", "fp32", "--save-txt", "--save-conf", "--nosave", "--conf", "0.3", *flags]) == 0
    return {path.name: np.loadtxt(path, ndmin=2) for path in sorted((place / "found" / name / "labels").iterdir())}


def test_files_and_what_is_said(place: Path, tmp_path: Path, capfd):
    save = (place / "alone" / "tiny.pt").read_bytes()
    (tmp_path / "mine.pt").write_bytes(save)
    flags = ["--include", *FILES, "--imgsz", "60", "90", "--half", "--data", str(place / "tiny_data.yaml")]
    assert export.main([*weights(tmp_path / "mine.pt"), *flags]) == 0
    out = capfd.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.onnx", "mine.pt", "mine.torchscript", "mine_openvino_model"]
    assert sorted(p.name for p in (tmp_path / "mine_openvino_model").iterdir()) == ["mine.bin", "mine.xml"]
    assert (tmp_path / "mine.pt").read_bytes() == save
    assert "64x96 px, fp16" in out and "raw outputs of 4 inputs" in out  # the val split's
    for name in ("mine.onnx", "mine.torchscript", "mine_openvino_model"):
        assert f"--weights {tmp_path / name} --source" in out and re.search(rf"{name}: [\d.]+ MiB.*max .*mean .* px.*have their partner", out)
        metadata = open_network(tmp_path / name).metadata
        assert (metadata.imgsz, metadata.dynamic, metadata.precision, metadata.source, metadata.names) == ((64, 96), False, "fp16", "mine.pt",
                                                                                                         ("red", "green"))
    assert len(metadata.anchors) == 3 and metadata.anchors[0][:2] == (10, 10)


def test_files_lie_beside_weights_that_are_found_beside_the_project(place: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("utils.checkpoint.ROOT", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tiny.pt").write_bytes((place / "alone" / "tiny.pt").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert export.main([*weights(Path("mine/tiny.pt")), "--include", "onnx"]) == 0
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == ["mine/tiny.onnx", "mine/tiny.pt"]


@pytest.mark.parametrize("kind", FILES)
def test_scores_are_the_checkpoints(kind: str, place: Path, capfd):
    for flags in ((), ("--augment",)):
        expected = scores(place, place / "alone" / "tiny.pt", *flags, capfd=capfd)
        assert_scores(scores(place, place / "dynamic" / FILES[kind], *flags, capfd=capfd), expected)


@pytest.mark.parametrize("kind", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_map_of_photographs_is_the_checkpoints(kind: str, shared: Path, tmp_path: Path, capfd):
    """A trained network, so that there is something to score."""
    (tmp_path / "yolov5n.pt").write_bytes((shared / "weights" / "yolov5n.pt").read_bytes())
    images = sorted((shared / "datasets" / "coco128" / "images").rglob("*.jpg"))[:9]
    (tmp_path / "list.txt").write_text("".join(f"{image}\n" for image in images))
    names = "".join(f"  {n}: {name}\n" for n, name in enumerate(open_weights(str(tmp_path / "yolov5n.pt"), "cpu", "fp32").names))
    (tmp_path / "tiny_data.yaml").write_text(f"train: list.txt\nval: list.txt\nnames:\n{names}")
    assert export.main([*weights(tmp_path / "yolov5n.pt"), "--include", kind, "--dynamic", "--imgsz", "192"]) == 0
    expected = scores(tmp_path, tmp_path / "yolov5n.pt", "--imgsz", "192", capfd=capfd)
    assert_scores(scores(tmp_path, tmp_path / FILES[kind].replace("tiny", "yolov5n"), capfd=capfd), expected)


def test_static_files_get_squares(place: Path, capfd, monkeypatch):
    """Of one checkpoint all formats find the same; so does the checkpoint on square images."""
    found = [scores(place, place / "static" / file, capfd=capfd) for file in FILES.values()]
    monkeypatch.setattr("models.weights.open_weights", lambda *args: dataclasses.replace(open_weights(*args), pad_stride=None))
    expected = scores(place, place / "alone" / "tiny.pt", capfd=capfd)
    for each in found:
        assert_scores(each, expected)


def test_a_file_that_is_not_square_is_scored_at_its_own_size(place: Path, tmp_path: Path, capfd, monkeypatch):
    """As the checkpoint is on images that are fitted into that."""
    (tmp_path / "tiny.pt").write_bytes((place / "alone" / "tiny.pt").read_bytes())
    assert export.main([*weights(tmp_path / "tiny.pt"), "--imgsz", "64", "96"]) == 0
    wide = scores(place, tmp_path / "tiny.onnx", capfd=capfd)

    class Wide(OpenWeights):
        def val_size(self, asked: int | None) -> tuple[int, int]:
            return 64, 96

    monkeypatch.setattr("models.weights.open_weights", lambda *args: Wide(**vars(dataclasses.replace(open_weights(*args), pad_stride=None))))
    assert_scores(wide, scores(place, place / "alone" / "tiny.pt", capfd=capfd))


@pytest.mark.parametrize("kind", FILES)
def test_boxes_are_the_checkpoints(kind: str, place: Path, capfd):
    """In images of three shapes, so that a dynamic file is given three sizes."""
    expected = lines(place, place / "alone" / "tiny.pt", f"pt-{kind}")
    assert len(expected) == 4 and sum(map(len, expected.values())) > 20
    dynamic = lines(place, place / "dynamic" / FILES[kind], f"dynamic-{kind}")
    assert set(dynamic) == set(expected)
    for name, rows in dynamic.items():
        np.testing.assert_allclose(rows, expected[name], atol=2e-5)
    capfd.readouterr()
    static = lines(place, place / "static" / FILES[kind], f"static-{kind}")
    assert capfd.readouterr().err.count(f"{FILES[kind]}: takes 3 images at once, so that each one alone costs as much: export it without") == 1
    np.testing.assert_allclose(static["00.txt"], expected["00.txt"], atol=2e-5)  # a square image is padded alike
    assert set(static) == set(expected)


def test_a_file_without_names_takes_those_of_the_data(place: Path, tmp_path: Path, capfd):
    import onnx

    model = onnx.load(place / "dynamic" / "tiny.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    flags = [*weights(tmp_path / "bare.onnx"), "--source", str(place / "images" / "val"), "--imgsz", "64", "--project", str(tmp_path / "runs")]
    assert detect.main(flags) == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and "name them with --data" in error
    assert detect.main([*flags, "--data", str(place / "tiny_data.yaml")]) == 0
    assert "red" in capfd.readouterr().out
    assert_scores(scores(place, tmp_path / "bare.onnx", "--imgsz", "64", capfd=capfd), scores(place, place / "alone" / "tiny.pt", capfd=capfd))


@pytest.mark.parametrize(("script", "flags", "words"), [
    ("export", ["--include", "onnx", "onx"], "--include onx: no such format; did you mean onnx"),
    ("export", ["--conf", "0.5"], "--conf-thres: is of --nms, .*: leave it out"),
    ("export", ["--include", "openvino", "ncnn", "--simplify"], "--simplify: is of --include onnx, mnn and engine: leave it out"),
    ("export", ["--int8"], r"--int8: is calibrated on the train split .* --data my_set\.yaml"),
    ("export", ["--int8", "--data", "tiny_data.yaml", "--half", "--batch", "2"], "--int8: goes without --half and --batch-size"),
    ("export", ["--int8", "--data", "tiny_data.yaml", "--device", "7"], "--int8: goes without --device"),
    ("export", ["--int8", "--data", "tiny_data.yaml", "--imgsz", "64", "96"], "--int8: is scored on square images: --imgsz 96, a single number"),
    ("export", ["--int8", "--data", "none.yaml"], r"none\.yaml: no such data YAML"),
    ("export", ["--weights", "none.pt"], r"none\.pt: no such weights"),
    ("export", ["--data", "none.yaml"], r"none\.yaml: no such data YAML"),
    ("export", ["--weights", "static/tiny.onnx"], r"tiny\.onnx: is exported, perhaps int8 already: name the checkpoint"),
    ("detect", ["--weights", "static/tiny.onnx", "--augment"], r"--augment looks at images in three sizes, and it takes 64x64 px only: .*--dynamic"),
    ("val", ["--weights", "static/tiny.onnx", "--imgsz", "96"], "takes images of 64x64 px only: leave out --imgsz"),
    ("detect", ["--weights", "static/tiny.onnx", "--imgsz", "64", "96"], "takes images of 64x64 px only"),
    ("detect", ["--weights", "half.onnx"], r"half\.onnx: .*cut off"), ("detect", ["--weights", "none_openvino_model"], "no such exported network"),
    ("detect", ["--weights", "static/tiny.onnx", "--classes", "2"], "--classes 2"),
    ("detect", ["--weights", "static/tiny.onnx", "--device", "0"], r"--device 0: .*runs on the CPU"),
    ("val", ["--weights", "static/tiny.onnx", "--half"], "--half"),
])  # fmt: skip
def test_mistakes_are_one_line(script: str, flags: list[str], words: str, place: Path, monkeypatch, capfd):
    monkeypatch.chdir(place)
    (place / "half.onnx").write_bytes((place / "static" / "tiny.onnx").read_bytes()[:999])
    given = {"export": weights(place / "alone" / "tiny.pt"), "val": ["--data", "tiny_data.yaml", "--workers", "0", "--project", "runs"],
             "detect": ["--source", "images/val", "--project", "runs"]}  # fmt: skip
    main = {"export": export.main, "val": val.main, "detect": detect.main}[script]
    assert main([*given[script], *flags]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if "it/s" not in line and line.strip()]
    assert len(error) == 1 and re.search(rf"^error: .*{words}", error[0]), error
    assert [p.name for p in (place / "alone").iterdir()] == ["tiny.pt"]


@pytest.mark.parametrize("opset", ["99", "3"])
def test_an_opset_that_nobody_writes(opset: str, place: Path, tmp_path: Path, capfd):
    (tmp_path / "mine.pt").write_bytes((place / "alone" / "tiny.pt").read_bytes())
    assert export.main([*weights(tmp_path / "mine.pt"), "--opset", opset]) == 1
    assert re.fullmatch(rf"error: onnx: --opset {opset}: PyTorch's exporters write \d+ in its place: .*\n", capfd.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.pt"]


def test_one_format_fails_and_the_other_is_done(place: Path, tmp_path: Path, monkeypatch, capfd):
    (tmp_path / "mine.pt").write_bytes((place / "alone" / "tiny.pt").read_bytes())
    monkeypatch.setattr("utils.extras.is_installed", lambda package: package != "openvino")
    assert export.main([*weights(tmp_path / "mine.pt"), "--include", "openvino", "onnx"]) == 1
    captured = capfd.readouterr()
    assert captured.err == "error: openvino: pip install openvino\n" and "mine.onnx" in captured.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.onnx", "mine.pt"]


@pytest.mark.parametrize("name", ["edgetpu", "executorch"])
def test_formats_of_other_machines(name: str, place: Path, tmp_path: Path, capfd):
    (tmp_path / "mine.pt").write_bytes((place / "alone" / "tiny.pt").read_bytes())
    assert export.main([*weights(tmp_path / "mine.pt"), "--include", name, "torchscript"]) == 1
    captured = capfd.readouterr()
    assert re.fullmatch(rf"error: {name}: not written here: .*\n", captured.err) and "mine.torchscript: " in captured.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.pt", "mine.torchscript"]


def test_simplified_and_suppressed(place: Path, tmp_path: Path, capfd):
    """val.py and detect.py run a file that suppresses boxes itself, and say what it has thrown away."""
    pytest.importorskip("onnxslim")
    (tmp_path / "tiny.pt").write_bytes((place / "alone" / "tiny.pt").read_bytes())
    flags = ["--include", "onnx", "--simplify", "--nms", "--dynamic", "--conf", "0.3", "--max-det", "300"]
    assert export.main([*weights(tmp_path / "tiny.pt"), *flags]) == 0
    assert "Model Name" not in capfd.readouterr().out
    expected = lines(place, place / "alone" / "tiny.pt", "pt-nms", "--max-det", "300")
    suppressed = lines(place, tmp_path / "tiny.onnx", "nms", "--max-det", "300")
    assert set(suppressed) == set(expected)
    for name, rows in suppressed.items():
        np.testing.assert_allclose(rows, expected[name], atol=2e-5)
    assert "warning" not in capfd.readouterr().err
    assert scores(place, tmp_path / "tiny.onnx", capfd=capfd).size
    assert lines(place, tmp_path / "tiny.onnx", "more", "--iou", "0.5")
    assert re.search(r"tiny\.onnx: suppresses boxes itself, with --conf-thres 0\.3 .*without --nms", capfd.readouterr().err)


# --- every network that ships --------------------------------------------------------------------------------------------------------------

YAMLS = sorted(str(path) for path in (Path(__file__).resolve().parents[1] / "models").glob("**/*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("cfg", YAMLS, ids=lambda path: Path(path).stem)
def test_every_yaml(cfg: str, dynamic: bool, tmp_path: Path):
    """Files of both formats find the network's own boxes on images, to within what PyTorch's own float32 is from its float64."""
    if "timm" in cfg:
        pytest.importorskip("timm")
    sow(cfg)
    model = DetectionModel(load_spec(cfg, nc=3))
    side = max(64, model.max_stride)
    own = lively(model)
    for conv, better in zip(model.head.m, own.head.m, strict=True):
        conv.load_state_dict(better.state_dict())
    save_checkpoint(tmp_path / "own.pt", Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict())))
    assert export.main([*weights(tmp_path / "own.pt"), "--include", "onnx", "openvino", "--imgsz", str(side), *["--dynamic"] * dynamic]) == 0
    images = torch.nn.functional.interpolate(torch.rand(2, 3, side // 8, side // 8 * (1 + dynamic)), scale_factor=8)  # in patches, as pictures are
    with torch.no_grad():
        expected = own.decode(own(images))
        noise = float((own.double().decode(own(images.double())) - expected).abs().max())
    for name in ("own.onnx", "own_openvino_model"):
        torch.testing.assert_close(open_network(tmp_path / name)(images), expected, rtol=1e-3, atol=1e-3 + 2 * noise)
