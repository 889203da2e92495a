"""What must run on a board with one of the small runtimes and without PyTorch: detect.py and Detector, with every format that needs none."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from exporting import job_of

from models.detector import Detector
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.data.scenes import render
from utils.export.formats import FORMATS
from utils.extras import is_installed
from utils.files import ROOT

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "ncnn": "ncnn", "tflite": "ai_edge_litert", "mnn": "MNN"}
ON_A_BOARD = """
import json, sys
for package in ("torch", "torchvision", "matplotlib", "pycocotools", "thop", "scipy", "pandas"):
    sys.modules[package] = None  # as if it were not installed

import detect
from models.detector import Detector
from utils.errors import UserError

weights, image, folder, checkpoint = sys.argv[1:]
codes = [detect.main(["--weights", weights, "--source", image, "--project", folder, "--conf", "0.01", "--save-txt", "--save-csv", "--save-crop"])]
codes += [detect.main(["--weights", *words, "--source", image, "--project", folder]) for words in ([checkpoint], [weights, "--augment"])]
mistakes = []
for words in ((checkpoint,), (weights + "x",), (weights, "cpu", "fp8")):
    try:
        Detector(*words)
    except UserError as error:
        mistakes.append(str(error))
(result,) = Detector(weights)(image, conf=0.01)
print(json.dumps({"codes": codes, "found": result.to_dict(), "mistakes": mistakes}))
"""


WHERE_ALL_IS = """
import sys

import detect
from models.detector import Detector

weights, image, folder = sys.argv[1:]
code = detect.main(["--weights", weights, "--source", image, "--project", folder])
Detector(weights)(image)
print(code, *sorted({"torch", "torchvision", "matplotlib", "pycocotools", "thop", "scipy", "pandas"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def checkpoint(place: Path, tiny) -> Path:
    save_checkpoint(place / "whole.pt", Checkpoint(tiny.spec.to_dict(), tiny.names, tiny.state_dict()))
    return place / "whole.pt"


@pytest.mark.parametrize("name", RUNTIMES)
def test_detection_without_torch(name: str, checkpoint: Path, tiny, tmp_path: Path) -> None:
    if not all(map(is_installed, (RUNTIMES[name], "pnnx" if name == "ncnn" else RUNTIMES[name]))):
        pytest.skip(f"pip install {RUNTIMES[name]}")
    kind = FORMATS[name]
    weights, image = tmp_path / f"tiny{kind.suffix}", tmp_path / "scene.png"
    if name == "tflite":
        shutil.copy(Path(__file__).with_name("tiny.tflite"), weights)
    else:
        if kind.is_folder:
            weights.mkdir()
        kind.write(job_of(tiny), weights)
    cv2.imwrite(str(image), render(0).image)
    command = [sys.executable, "-c", ON_A_BOARD, *map(str, (weights, image, tmp_path / "runs", checkpoint))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["codes"] == [0, 2, 2] and (tmp_path / "runs/exp/scene.png").is_file()
    assert done.stderr.splitlines()[-2:] == ["error: needs torch: pip install -r requirements.txt"] * 2
    assert "whole.pt: is no exported file, and a checkpoint needs PyTorch (pip install torch torchvision); export.py makes" in told["mistakes"][0]
    assert "no such weights file" in told["mistakes"][1] and told["mistakes"][2] == "precision 'fp8': one of auto, fp32, bf16, fp16"
    (here,) = Detector(weights)(image, conf=0.01)
    assert len(here) and told["found"]["boxes"] == here.to_dict()["boxes"], "the same boxes as where PyTorch is"
    np.testing.assert_array_equal(here.image, render(0).image)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_detection_imports_no_torch_where_it_is(name: str, tiny, tmp_path: Path) -> None:
    """It would take three times as long to start."""
    pytest.importorskip(RUNTIMES[name])
    weights, image = tmp_path / f"tiny{FORMATS[name].suffix}", tmp_path / "scene.png"
    if FORMATS[name].is_folder:
        weights.mkdir()
    FORMATS[name].write(job_of(tiny), weights)
    cv2.imwrite(str(image), render(0).image)
    command = [sys.executable, "-c", WHERE_ALL_IS, *map(str, (weights, image, tmp_path / "runs"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"
