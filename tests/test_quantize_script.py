"""quantize.py from the command line to files that val.py and detect.py run: exit codes, what is written and what is left alone."""
from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import data_yaml, tiny_model

import detect
import export
import quantize
import val
from models.yolo import load_model
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.compress import quantization
from utils.compress.int8 import Scores, int8_format
from utils.cpu import cpu_int8
from utils.errors import UserError
from utils.export.backends import open_network


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    model = tiny_model(folder, width=16)
    save_checkpoint(folder / "best.pt", Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict()), imgsz=64))
    (folder / "data").mkdir()
    data_yaml(folder / "data", train=9)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(quantization, "_ROUNDS", 3)


def needs(kind: str) -> None:
    try:
        int8_format(kind)
    except UserError as missing:
        pytest.skip(str(missing))


def flags(place: Path, kind: str, **changed: object) -> list[str]:
    data = place / "data" / "tiny_data.yaml"
    values = {"weights": place / "best.pt", "data": data, "to": kind, "workers": 0, "calib": 8, "batch-size": 4} | changed
    return [word for name, value in values.items() for word in ((f"--{name}", str(value)) if value is not True else (f"--{name}",))]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("kind", "name"), [("onnx", "best_int8.onnx"), ("openvino", "best_int8_openvino_model")])
def test_from_a_checkpoint_to_boxes(kind: str, name: str, place: Path, capsys):
    needs(kind)
    before = digest(place / "best.pt")
    assert quantize.main(flags(place, kind, sensitivity=True, **{"max-drop": 100})) == 0
    said = capsys.readouterr().out
    assert cpu_int8() in said and "calibrated on 8 training images of 64 x 64 px" in said
    table = [line.split() for line in said.splitlines() if "fp32 " in line or f"{kind} float" in line or f"{kind} int8" in line]
    assert [row[:2] for row in table] == [["PyTorch", "fp32"], [kind, "float"], [kind, "int8"]] and all(len(row) == 8 for row in table)
    floats = sum(tensor.numel() for tensor in load_model(str(place / "best.pt")).fused().state_dict().values())
    assert float(table[0][4]) == pytest.approx(4 * floats / 2**20, abs=0.005)  # not the file's, which may be fp16 or hold an optimizer
    assert f"results: {place / name}" in said
    assert digest(place / "best.pt") == before
    assert (place / "best_int8_sensitivity.csv").exists() and (place / "best_int8_sensitivity.png").exists()
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    metadata = open_network(place / name).metadata
    assert (metadata.precision, metadata.float_layers, metadata.source, metadata.imgsz) == ("int8", (), "best.pt", (64, 64))

    shared = ["--weights", str(place / name), "--project", str(place / "runs"), "--device", "cpu", "--name", kind]
    assert val.main([*shared, "--data", str(place / "data" / "tiny_data.yaml"), "--workers", "0", "--save-json", "--noplots"]) == 0
    scored = json.loads((place / "runs" / kind / "predictions.json").read_text())
    assert scored and {row["category_id"] for row in scored} <= {0, 1}
    assert detect.main([*shared, "--source", str(place / "data" / "images" / "val"), "--conf", "0.001", "--save-txt", "--exist-ok"]) == 0
    assert list((place / "runs" / kind / "labels").glob("*.txt"))


def test_by_export(place: Path, tmp_path: Path, capsys, monkeypatch):
    """export.py --int8 makes the same files, of several formats; PyTorch is scored once for all."""
    needs("onnx")
    needs("openvino")
    (tmp_path / "best.pt").write_bytes((place / "best.pt").read_bytes())
    asked = []
    monkeypatch.setattr(quantization.Quantization, "score", lambda self, network: asked.append(network) or Scores(0.9, 0.5))
    command = ["--weights", str(tmp_path / "best.pt"), "--data", str(place / "data" / "tiny_data.yaml"), "--int8", "--include"]
    assert export.main([*command, "onnx", "ncnn", "openvino"]) == 1
    said = capsys.readouterr()
    assert "error: ncnn: no int8 files of this format are written here; onnx, openvino, tflite ones run on ARM too\n" in said.err
    assert said.err.count("error: ") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "best_int8.onnx", "best_int8_openvino_model"} and len(asked) == 5
    for name in ("best_int8.onnx", "best_int8_openvino_model"):
        assert f"results: {tmp_path / name}" in said.out and open_network(tmp_path / name).metadata.precision == "int8"
    assert export.main([*command, "onnx"]) == 0


def test_by_export_of_a_network_of_one_class(tmp_path: Path, capsys, monkeypatch):
    """Trained with --single-cls on data of several."""
    needs("onnx")
    model = tiny_model(tmp_path, names=("item",), width=16)
    save_checkpoint(tmp_path / "best.pt", Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict()), imgsz=64))
    data = data_yaml(tmp_path, train=9)
    monkeypatch.setattr(quantization.Quantization, "score", lambda self, network: Scores(0.9, 0.5))
    assert export.main(["--weights", str(tmp_path / "best.pt"), "--data", str(data), "--int8"]) == 0
    assert "best_int8.onnx" in (said := capsys.readouterr().out) and "--single-cls" in said


def test_a_format_of_one_size_says_so_before_anything_is_scored(place: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("utils.export.formats.pip_install", lambda packages: None)
    monkeypatch.setattr(quantization.Quantization, "score", lambda self, network: pytest.fail("nothing is to be scored"))
    assert quantize.main(flags(place, "tflite", dynamic=True)) == 2
    assert "error: tflite: a TFLite graph holds one image size: leave out --dynamic" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_file_that_loses_too_much_is_kept_aside(kind: str, place: Path, tmp_path: Path, capsys, monkeypatch):
    needs(kind)
    (tmp_path / "best.pt").write_bytes((place / "best.pt").read_bytes())
    scores = iter([0.5, 0.5, *[0.45] * 9])  # PyTorch, float, then int8
    monkeypatch.setattr(quantization.Quantization, "score", lambda self, network: Scores(0.9, next(scores)))
    suffix = int8_format(kind).suffix
    assert quantize.main(flags(place, kind, weights=tmp_path / "best.pt")) == 1
    captured = capsys.readouterr()
    aside = tmp_path / f"best_int8.failed{suffix}"
    assert "loses 5.00 points of mAP50-95, more than --max-drop 1" in captured.err and str(aside) in captured.err and "results:" not in captured.out
    most = {"onnx": "1 of 5", "openvino": "2 of 8"}[kind]  # a quarter; Detect's own can be int8 in OpenVINO alone
    assert f"with up to {most} layers in float" in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", aside.name}
    assert open_network(aside).metadata.precision == "int8"


def test_a_network_that_finds_nothing_proves_nothing(place: Path, tmp_path: Path, capsys, monkeypatch):
    needs("onnx")
    (tmp_path / "best.pt").write_bytes((place / "best.pt").read_bytes())
    monkeypatch.setattr(quantization.Quantization, "score", lambda self, network: Scores(0.0, 0.0))
    assert quantize.main(flags(place, "onnx", weights=tmp_path / "best.pt")) == 2
    assert "finds nothing on the val images" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_a_float_file_that_is_wrong_is_no_measure(place: Path, tmp_path: Path, capsys, monkeypatch):
    needs("onnx")
    (tmp_path / "best.pt").write_bytes((place / "best.pt").read_bytes())
    scores = iter([0.5, 0.0, 0.0])  # PyTorch, float, int8: nothing lost against the float file
    monkeypatch.setattr(quantization.Quantization, "score", lambda self, network: Scores(0.9, next(scores)))
    assert quantize.main(flags(place, "onnx", weights=tmp_path / "best.pt")) == 2
    assert "its onnx file has an mAP50-95 of 0.0000 before anything is rounded, where PyTorch has 0.5000" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_files_of_earlier_runs_are_told_of(place: Path, tmp_path: Path, capsys, monkeypatch):
    needs("onnx")
    (tmp_path / "best.pt").write_bytes((place / "best.pt").read_bytes())
    for int8, code, other in ((0.5, 0, ""), (0.4, 1, "best_int8.onnx"), (0.5, 0, "best_int8.failed.onnx")):
        scores = iter([0.5, 0.5, *[int8] * 9])
        monkeypatch.setattr(quantization.Quantization, "score", lambda self, network, scores=scores: Scores(0.9, next(scores)))
        assert quantize.main(flags(place, "onnx", weights=tmp_path / "best.pt")) == code
        said = capsys.readouterr().err
        assert (f"{tmp_path / other}: is of an earlier run" in said) == bool(other) and said.count("earlier run") == bool(other)


def test_the_file_lies_beside_weights_that_are_found_beside_the_project(place: Path, tmp_path: Path, monkeypatch):
    needs("onnx")
    monkeypatch.setattr("utils.checkpoint.ROOT", place)
    monkeypatch.chdir(tmp_path)
    (place / "mine").mkdir()
    (place / "mine" / "best.pt").write_bytes((place / "best.pt").read_bytes())
    assert quantize.main(flags(place, "onnx", weights="mine/best.pt", **{"max-drop": 100})) == 0
    assert {path.name for path in (place / "mine").iterdir()} == {"best.pt", "best_int8.onnx"} and not list(tmp_path.iterdir())


def test_a_sensitive_layer_stays_float(place: Path, tmp_path: Path, capsys, monkeypatch):
    needs("onnx")
    (tmp_path / "tiny-0.5x.pt").write_bytes((place / "best.pt").read_bytes())
    scores = iter([0.5, 0.5, 0.45, 0.495])
    monkeypatch.setattr(quantization.Quantization, "score", lambda self, network: Scores(0.9, next(scores)))
    assert quantize.main(flags(place, "onnx", weights=tmp_path / "tiny-0.5x.pt", sensitivity=True)) == 0
    (kept,) = open_network(tmp_path / "tiny-0.5x_int8.onnx").metadata.float_layers
    said = capsys.readouterr().out
    assert f"with {kept} in float too" in said and f"in float, the most sensitive first: {kept}" in said
    assert (tmp_path / "tiny-0.5x_int8_sensitivity.png").exists()
    rows = (tmp_path / "tiny-0.5x_int8_sensitivity.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows if row.endswith(",1")] == [kept]
    assert next(row for row in rows if not row.startswith("model.5.m.")).startswith(kept)  # Detect's own layers are float in ONNX anyway


@pytest.mark.parametrize(("flags", "said"), [
    ({"avx2", "avx512f"}, "no int8 instructions"), ({"avx2", "avx_vnni"}, "AVX-VNNI"), ({"avx512_vnni", "avx_vnni"}, "AVX-512 VNNI and AVX-VNNI"),
    ({"amx_int8", "avx512_vnni"}, "AMX and AVX-512 VNNI"), ({"asimddp"}, "dot products"), (set(), "int8 instructions that this system"),
])  # fmt: skip
def test_the_processors_int8_is_named(flags, said, monkeypatch):
    monkeypatch.setattr("utils.cpu._cpu_flags", lambda: flags)
    assert cpu_int8().startswith(said)


def test_a_folder_that_nothing_can_be_written_into(place: Path, tmp_path: Path, capsys):
    shutil.copy(place / "best.pt", tmp_path)
    tmp_path.chmod(0o555)
    try:
        assert quantize.main(flags(place, "onnx", weights=tmp_path / "best.pt")) == 2
    finally:
        tmp_path.chmod(0o755)
    assert f"{tmp_path}: the int8 file is written beside the weights, and nothing may be written there" in capsys.readouterr().err


def test_bad_input(place: Path, tmp_path: Path, capsys):
    (tmp_path / "few").mkdir()
    few = data_yaml(tmp_path / "few", train=5)
    three = tmp_path / "few" / "three.yaml"
    three.write_text(yaml.safe_dump(yaml.safe_load(few.read_text()) | {"names": ["a", "b", "c"]}))
    (place / "other_openvino_model").mkdir(exist_ok=True)
    for changed, words in (
        ({"weights": place / "best_int8.onnx"}, "is exported, perhaps int8 already: name the checkpoint"),
        ({"weights": place / "other_openvino_model"}, "is exported, perhaps int8 already"),
        ({"weights": place / "none.pt"}, "none.pt: no such weights file"),
        ({"data": few}, "its training split has 5 images, and int8 needs 8"),
        ({"data": three}, "knows 2 classes, the data has 3"),
        ({"data": "none.yaml"}, "none.yaml"),
        ({"calib": 7}, "--calib 7: must be 8 or more"),
        ({"max-drop": -1}, "--max-drop -1"),
        ({"to": "ncnn"}, "--to: invalid choice"),
    ):
        assert quantize.main(flags(place, "onnx", **changed)) == 2, changed
        error = capsys.readouterr().err.strip()
        assert words in error and error.startswith("error: ") and "\n" not in error, error
