"""Core ML packages: written anywhere. `mil.py` computes the program that is stored in them, in place of Core ML, which is on Macs only."""
from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import assert_exports, job_of
from PIL import Image
from tiny import lively_checkpoint

from models.detector import Detector
from utils.errors import UserError
from utils.export import coreml
from utils.export.backends import find_exported, is_exported, open_network
from utils.export.check import check_images
from utils.export.formats import FORMATS
from utils.export.produce import produce
from utils.files import size_bytes
from utils.log import no_output, silent_libraries

with silent_libraries(), no_output(2):
    coremltools = pytest.importorskip("coremltools")
from mil import StoredProgram

import export
import val

CPU = torch.device("cpu")
MODELS = Path(__file__).resolve().parents[1] / "models"


MLModel = coremltools.models.MLModel


def mac_model(path: str, **options: Any) -> MLModel:
    """As coremltools opens a package on a Mac."""
    model = MLModel(path, **(options or {"skip_model_load": True}))
    if not options:  # with them it is the converter that calls
        model.predict = StoredProgram(Path(path)).predict
    return model


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "RUNS_HERE", True)
    monkeypatch.setattr(coremltools.models, "MLModel", mac_model)
    monkeypatch.setitem(FORMATS, "coreml", dataclasses.replace(FORMATS["coreml"], elsewhere=""))


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_package_and_what_it_finds(precision: str, tiny, tmp_path: Path, capfd):
    path = produce(job_of(tiny, (64, 64), precision), FORMATS["coreml"], tmp_path / "a", check_images()[:2], tiny, CPU)
    said = "".join(capfd.readouterr())
    assert re.fullmatch(rf"coreml: {path}: [\d.]+ MiB, .* have their partner\nwarning: --batch-size 2: a Core ML graph takes one image at a time: "
                        r"batches run one by one\n", said), said
    assert path.name == "a.mlpackage" and is_exported(path) and find_exported(path) == path and [p.name for p in tmp_path.iterdir()] == [path.name]
    files = [file for file in path.rglob("*") if file.is_file()]
    assert size_bytes(path) == sum(file.stat().st_size for file in files) > 0
    (tmp_path / "plain").mkdir()
    mode = (tmp_path / "plain").stat().st_mode & 0o777  # as the user's umask has it
    assert all(entry.stat().st_mode & 0o777 == (mode if entry.is_dir() else mode & 0o666) for entry in (path, *path.rglob("*")))

    network = open_network(path)
    assert network.metadata == job_of(tiny, (64, 64), precision).metadata and network.fixed == network.imgsz == (64, 64)
    assert network.names == tiny.names and network.batch == 1 and network.description.startswith("Core ML, by coremltools ")
    images = (torch.rand(3, 3, 64, 64) * 255).round() / 255  # it takes pictures: bytes
    atol = 1e-3 if precision == "fp32" else 0.3
    torch.testing.assert_close(network(images), tiny.decode(tiny(images)), rtol=1e-3, atol=atol)


@pytest.mark.usefixtures("mac")
def test_half_is_the_networks_and_not_the_boxes(tiny, tmp_path: Path):
    """Places in fp16 would be in steps of half a pixel from 512 on."""
    job = job_of(tiny, (64, 1024), "fp16")
    package = tmp_path / "a.mlpackage"
    package.mkdir()
    FORMATS["coreml"].write(job, package)
    boxes = open_network(package)(torch.full((1, 3, 64, 1024), 0.4))
    far = boxes[0, :, 0][boxes[0, :, 0] > 600]
    assert len(far) and (far != far.half().float()).any()
    convs = [op for op in StoredProgram(package).main.operations if op.op_type == "conv"]
    assert convs and all(op.outputs[0].dtype.__name__ == "fp16" for op in convs)


@pytest.mark.usefixtures("mac")
def test_it_takes_the_paths_of_a_checkpoint(tiny, tmp_path: Path, capfd):
    checkpoint = lively_checkpoint(tmp_path)
    assert export.main(["--weights", str(checkpoint), "--include", "coreml", "--imgsz", "64"]) == 0
    file = tmp_path / "tiny.mlpackage"
    assert f"python detect.py --weights {file} --source" in capfd.readouterr().out
    image = check_images()[0][:192, :192]  # the checkpoint pads to no more than the package then
    found, own = (Detector(path, precision="fp32")(image, conf=0.01, imgsz=64)[0] for path in (file, checkpoint))
    assert len(found.xyxy) and found.names == tiny.names
    np.testing.assert_allclose(found.conf, own.conf, atol=1e-4)
    np.testing.assert_allclose(found.xyxy, own.xyxy, atol=1e-2)
    assert val.main(["--weights", str(file), "--data", "coco128.yaml", "--imgsz", "96"]) == 2
    assert "takes images of 64x64 px only" in capfd.readouterr().err


@pytest.mark.usefixtures("mac")
def test_a_package_that_finds_other_boxes(tiny, tmp_path: Path, monkeypatch):
    right = StoredProgram.predict
    monkeypatch.setattr(StoredProgram, "predict", lambda self, pictures: {"output0": right(self, pictures)["output0"] * 1.2})
    with pytest.raises(UserError, match=r"^coreml: does not find what the checkpoint finds: .* kept aside as .*a\.mismatch\.mlpackage$"):
        produce(job_of(tiny), FORMATS["coreml"], tmp_path / "a", check_images()[:2], tiny, CPU)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mismatch.mlpackage"]


@pytest.mark.skipif(coreml.RUNS_HERE, reason="a Mac")
def test_elsewhere_it_is_written_and_says_that_it_is_unchecked(tiny, tmp_path: Path, capfd):
    checkpoint = lively_checkpoint(tmp_path)
    (tmp_path / "tiny.mlpackage").mkdir()  # of an earlier export on a Mac: stays
    for _ in range(2):
        assert export.main(["--weights", str(checkpoint), "--include", "coreml", "torchscript", "--imgsz", "64"]) == 1
        error = capfd.readouterr().err
        assert re.fullmatch(r"error: coreml: written as \S*tiny\.unchecked\.mlpackage, unchecked: Core ML runs, .* on a Mac only: .*\n", error), error
    names = ["tiny.mlpackage", "tiny.pt", "tiny.torchscript", "tiny.unchecked.mlpackage", "tiny.yaml"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names and not list((tmp_path / "tiny.mlpackage").iterdir())
    pictures = check_images()[0][:64, :64, ::-1]
    with torch.no_grad():
        own = tiny.decode(tiny(torch.from_numpy(pictures.copy()).permute(2, 0, 1)[None] / 255))
    picture = Image.fromarray(np.ascontiguousarray(pictures))
    stored = StoredProgram(tmp_path / "tiny.unchecked.mlpackage").predict({"image": picture})["output0"]
    np.testing.assert_allclose(stored, own, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match=r"tiny\.unchecked\.mlpackage: Core ML runs on a Mac only: take the checkpoint here, or another format$"):
        open_network(tmp_path / "tiny.unchecked.mlpackage")


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("lost", ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"])
def test_a_package_that_is_not_whole(lost: str, tiny, tmp_path: Path, capfd):
    folder = tmp_path / "a.mlpackage"
    folder.mkdir()
    FORMATS["coreml"].write(job_of(tiny), folder)
    capfd.readouterr()
    (folder / lost).write_bytes((folder / lost).read_bytes()[:20])
    with pytest.raises(UserError, match=r"a\.mlpackage: Core ML can't load it, it may be cut off or no Core ML package: ") as caught:
        open_network(folder)
    assert "\n" not in str(caught.value) and "".join(capfd.readouterr()) == ""


def test_one_size_only(tiny, tmp_path: Path):
    with pytest.raises(UserError, match=r"^coreml: a Core ML graph holds one image size: leave out --dynamic$"):
        produce(job_of(tiny, dynamic=True), FORMATS["coreml"], tmp_path / "a", [], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


def test_its_package_is_named(tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("utils.extras.is_installed", lambda package: False)
    assert FORMATS["coreml"].missing() == "pip install coremltools"


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("cfg", ["yolov5s-ghost.yaml", "yolov5s-shuffle.yaml"])
def test_light_networks(cfg: str, tmp_path: Path):
    assert_exports(cfg, tmp_path, "coreml")


@pytest.mark.slow
@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("cfg", sorted(path.name for path in MODELS.glob("*.yaml") if path.stem not in ("yolov5l", "yolov5x")))
def test_every_network(cfg: str, tmp_path: Path):
    assert_exports(cfg, tmp_path, "coreml")
