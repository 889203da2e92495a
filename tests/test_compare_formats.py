"""compare.py --formats: which files belong to a checkpoint, the whole comparison on a tiny network, and what goes wrong with one of them."""
from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from tiny import data_yaml, label_by, lively_checkpoint

import compare
import export
from models.yolo import load_model
from utils.compare import formats
from utils.compare.formats import FormatRow, find_formats, table
from utils.errors import UserError
from utils.export.formats import FORMATS, ExportJob
from utils.export.metadata import ExportMetadata, GraphNms
from utils.extras import is_installed
from utils.measure.timing import Latency
from utils.plots.formats import draw_formats


@pytest.mark.parametrize("bf16", [True, False])
def test_the_files_of_a_checkpoint(bf16: bool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(formats, "cpu_has_native_bf16", lambda: bf16)
    for name in ("best.pt", "last.pt", "best.onnx", "best_int8.onnx", "best2.onnx", "last.onnx", "best.mismatch.onnx", "best_int8.failed.onnx",
                 "best.engine", "best.txt", "best_small.pt", "best_small.onnx", "best_small_int8.onnx", "net_int8.pt", "net_int8.onnx",
                 "net_int8_int8.onnx"):  # fmt: skip
        (tmp_path / name).touch()
    for name in ("best_openvino_model", "best_int8_openvino_model", "best.mismatch_openvino_model"):
        (tmp_path / name).mkdir()
    found = [(row.path.name, row.precision) for row in find_formats(tmp_path / "best.pt")]
    both = ("fp32", "bf16") if bf16 else ("fp32",)
    assert found == [*(("best.pt", p) for p in both), ("best.onnx", "fp32"), ("best_int8.onnx", "int8"), ("best_int8_openvino_model", "int8"),
                     *(("best_openvino_model", p) for p in both)]
    named_so = [row.precision for row in find_formats(tmp_path / "net_int8.pt")]
    assert named_so == [*both, "fp32", "int8"], "a checkpoint computes in float, whatever its name"


def test_table_by_hand(tmp_path: Path):
    (tmp_path / "best.pt").write_bytes(bytes(2**20))
    (tmp_path / "best.onnx").write_bytes(bytes(2**19))
    rows = [FormatRow(tmp_path / "best.pt", "fp32", "", 0.5, 0.25, Latency(20.0, 21.0, 0.05, 9), 3.0),
            FormatRow(tmp_path / "best.onnx", "fp32", "", None, None, Latency(8.0, 9.0, 0.1, 9), None, "broken")]
    lines = [line.split() for line in table(rows)]
    assert lines[1:] == [["best.pt", "fp32", "1.00", "0.5000", "0.2500", "20.0", "5%", "1.00", "3.00"],
                         ["best.onnx", "fp32", "0.50", "–", "–", "8.0", "10%", "2.50", "–"]]


def test_a_tiny_networks_formats(tmp_path: Path, monkeypatch, capsys):
    """One of them is cut off: it costs its own row, and the exit code."""
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    monkeypatch.setattr(formats, "_ROUNDS", 3)
    monkeypatch.setattr(formats, "_STARTS", 2)
    monkeypatch.setattr(formats, "cpu_has_native_bf16", lambda: False)
    lively_checkpoint(tmp_path).rename(tmp_path / "best.pt")
    network = load_model(str(tmp_path / "best.pt")).fused().requires_grad_(False)

    def write(kind: str, file: str, precision: str = "fp32", dynamic: bool = False, nms: GraphNms | None = None,
              size: tuple[int, int] = (64, 64)) -> None:
        metadata = ExportMetadata.of(network, size, dynamic=dynamic, precision=precision, source="best.pt", nms=nms)
        if FORMATS[kind].is_folder:
            (tmp_path / file).mkdir()
        FORMATS[kind].write(ExportJob(network, metadata, opset=17), tmp_path / file)

    write("onnx", "best.onnx", dynamic=True)
    write("onnx", "best_nms.onnx", nms=GraphNms(0.25, 0.45, 100))
    write("onnx", "best_wide.onnx", size=(32, 64))
    needs = {"torchscript": "torch", "openvino": "openvino", "ncnn": "pnnx", "mnn": "MNN"}
    others = {kind: f"best{FORMATS[kind].suffix}" for kind, package in needs.items() if is_installed(package)}
    for kind, file in others.items():
        write(kind, file, "fp16" if kind == "openvino" else "fp32")
    (tmp_path / "best_cut.onnx").write_bytes((tmp_path / "best.onnx").read_bytes()[:1000])
    data = data_yaml(tmp_path)
    label_by(tmp_path / "best.pt", tmp_path / "images" / "val")
    assert compare.main(["--formats", str(tmp_path / "best.pt"), "--data", str(data), "--project", str(tmp_path / "out"), "--workers", "0"]) == 1
    with open(tmp_path / "out" / "exp" / "formats.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    whole = {"best.pt", "best.onnx", "best_nms.onnx", "best_wide.onnx", *others.values()}
    assert set(rows) == whole | {"best_cut.onnx"} and "cut off" in rows["best_cut.onnx"]["problem"]
    for name in whole:
        assert float(rows[name]["latency_ms"]) > 0 and float(rows[name]["start_s"]) > 0 and not rows[name]["problem"]
    assert float(rows["best.pt"]["mAP50-95"]) > 0.1
    for name in ({"best.torchscript", "best_ncnn_model"} & rows.keys()):
        assert float(rows[name]["mAP50-95"]) == pytest.approx(float(rows["best.pt"]["mAP50-95"]), rel=1e-3), "all on squares, as these are"
    assert float(rows["best.onnx"]["mAP50-95"]) == pytest.approx(float(rows["best.pt"]["mAP50-95"]), rel=1e-3)
    assert {rows[name]["precision"] for name in others.values()} == {"fp32", *(["fp16"] if "openvino" in others else [])}
    assert rows["best.onnx"]["imgsz"] == "64" and rows["best.onnx"]["machine"] and rows["best.onnx"]["threads"] == "1"
    assert rows["best_wide.onnx"]["imgsz"] == "32x64" and float(rows["best_wide.onnx"]["mAP50-95"]) > 0
    assert "ONNX Runtime" in rows["best.onnx"]["runtime"] and cv2.imread(str(tmp_path / "out" / "exp" / "formats.png")).size
    printed = capsys.readouterr()
    assert "best_wide.onnx fp32 32x64: takes no other image size than that" in printed.out
    assert f"{4 + len(others)} exported files beside it, at 64 px" in printed.out and "Traceback" not in printed.err
    assert "best_nms.onnx fp32 nms: " in printed.out and "best_nms.onnx: suppresses boxes itself, with --conf-thres 0.25" in printed.err


def test_picture_without_scores(tmp_path: Path):
    draw_formats(tmp_path / "a.png", ["best.pt", "best.onnx"], {"mAP50-95": [None, None], "latency, ms": [3.0, None], "size": [0.0, 0.0]}, "best.pt")
    assert cv2.imread(str(tmp_path / "a.png")) is not None


@pytest.mark.parametrize("data", [True, False])
def test_a_file_of_another_size_decides_nothing(data: bool, tmp_path: Path, monkeypatch):
    """It is opened before any is started, and the others are scored as val.py scores them."""
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    lively_checkpoint(tmp_path).rename(tmp_path / "best.pt")
    for flags in (["--imgsz", "32", "64"], ["--dynamic"]):
        assert export.main(["--weights", str(tmp_path / "best.pt"), *flags]) == 0
        if "--imgsz" in flags:
            (tmp_path / "best.onnx").rename(tmp_path / "best_wide.onnx")
    started, strides = {}, []
    monkeypatch.setattr(formats, "cpu_has_native_bf16", lambda: False)
    monkeypatch.setattr(formats, "_ROUNDS", 3)

    def start(command: list[str], **_: object) -> SimpleNamespace:
        started[Path(command[3]).name] = command
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(formats.subprocess, "run", start)
    loader = formats.val_loader
    monkeypatch.setattr(formats, "val_loader", lambda *args: strides.append(args[3]) or loader(*args))
    named = ["--data", str(data_yaml(tmp_path)), "--workers", "0"] if data else []
    assert compare.main(["--formats", str(tmp_path / "best.pt"), *named, "--project", str(tmp_path / "out"), "--noplots"]) == 0
    assert {name: "--imgsz" in command for name, command in started.items()} == {"best.pt": True, "best.onnx": True, "best_wide.onnx": False}
    assert strides == ([32, 32, None] if data else [])


def test_a_file_that_opens_and_does_not_run_costs_its_row(tmp_path: Path, monkeypatch):
    def one(runner: str, images: np.ndarray) -> Callable[[], None]:
        def run() -> None:
            if runner == "bad.onnx":
                raise UserError("bad.onnx: other outputs")

        return run

    monkeypatch.setattr(formats, "_one", one)
    def size_of(asked: int | None) -> int | tuple[int, int]:
        return asked or (32, 64)

    comparison = object.__new__(formats.FormatComparison)
    comparison.imgsz, comparison.rows = 64, [FormatRow(Path(name), "fp32") for name in ("bad.onnx", "best.pt")]
    comparison._open = lambda row, at_once: SimpleNamespace(runner=row.path.name, val_size=size_of, description="", fixed=None)
    comparison._time(np.zeros((64, 64, 3), np.uint8))
    bad, best = comparison.rows
    assert bad.problem == "bad.onnx: other outputs" and bad.latency is None and best.latency.runs >= 3


@pytest.mark.parametrize("flags", [["--runtimes", "openvino"], ["--device", "0"], ["--layers"], ["--cfg", "a.yaml", "--seeds", "1"],
                                   ["--batch-size", "4"]])
def test_flags_that_formats_have_no_use_for(flags: list[str], tmp_path: Path, capsys):
    assert compare.main(["--formats", "best.pt", *flags]) == 2
    assert f"leave out {flags[0]}" in capsys.readouterr().err


def test_no_such_checkpoint(tmp_path: Path, capsys):
    assert compare.main(["--formats", str(tmp_path / "none.pt"), "--project", str(tmp_path)]) == 2
    assert "none.pt" in capsys.readouterr().err
    assert compare.main(["--formats", str(tmp_path / "best.onnx"), "--project", str(tmp_path)]) == 2
    assert "best.onnx: is an exported file: name the checkpoint that it lies beside" in capsys.readouterr().err
