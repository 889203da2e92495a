"""TFLite files: what the network finds, in LiteRT; every way in which a file can be wrong; and, where its converter is, every network that ships.

tiny.tflite is `tiny()` below, as export.py wrote it where litert-torch is installed, which wants an older PyTorch than the newest.
"""
from __future__ import annotations

import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from exporting import assert_cut_off_is_told, assert_exports, job_of
from tiny import data_yaml

import val
from models.detector import Detector
from utils.errors import UserError
from utils.export import backends, trailer
from utils.export.backends import find_exported, is_exported, open_network
from utils.export.check import check_images
from utils.export.formats import FORMATS
from utils.export.metadata import KEY
from utils.export.produce import produce
from utils.extras import is_installed

pytest.importorskip("ai_edge_litert")
needs_converter = pytest.mark.skipif(not is_installed("litert_torch"), reason="pip install litert_torch, beside an older PyTorch")
CPU = torch.device("cpu")
MODELS = Path(__file__).resolve().parents[1] / "models"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(shutil.copy(Path(__file__).with_name("tiny.tflite"), tmp_path))


def test_what_the_file_finds(file: Path, tiny):
    network = open_network(file)
    assert network.metadata == job_of(tiny).metadata and network.fixed == network.imgsz == (64, 96) and network.names == tiny.names
    images = torch.rand(3, 3, 64, 96)  # the file is of two at a time
    torch.testing.assert_close(network.decode(network(images)), tiny.decode(tiny(images)), rtol=1e-4, atol=1e-4)
    assert network.description.startswith("LiteRT ")
    with pytest.raises(UserError, match="takes images of 64x96 px only"):
        network(torch.rand(1, 3, 96, 64))
    with zipfile.ZipFile(file) as archive:
        assert archive.read("labels.txt") == b"red\ngreen\n"


def test_a_thread_after_the_file_is_gone(file: Path):
    """The file is read once: whatever is under its name later is of another network."""
    network, images = open_network(file), torch.rand(2, 3, 64, 96)
    expected = network(images)
    file.write_bytes(b"another export")
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(network, images).result(), expected)


def test_threads_share_a_network(file: Path, tiny, monkeypatch):
    monkeypatch.setattr(backends, "cpu_threads", lambda: 3)
    network = open_network(file, at_once=3)
    batches = [torch.rand(2, 3, 64, 96) for _ in range(12)]
    expected = [tiny.decode(tiny(batch)) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for found, own in zip(pool.map(network, batches), expected, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_it_takes_the_paths_of_a_checkpoint(file: Path, tmp_path: Path, capfd):
    assert is_exported(file) and find_exported(file) == file
    (result,) = Detector(file)(check_images()[0], conf=0.01)
    assert len(result.xyxy) and result.names == ("red", "green")
    assert val.main(["--weights", str(file), "--data", str(data_yaml(tmp_path)), "--workers", "0", "--project", str(tmp_path / "runs")]) == 0
    assert "an image at 64x96 px" in capfd.readouterr().out


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_file_cut_off(share: float, file: Path, capfd):
    words = r"tiny\.tflite: holds no light_yolo\.json of export\.py: it is cut off, or of another program, .*export it"
    assert_cut_off_is_told(file, share, words, capfd)


def damaged(whole: bytes, start: int, stop: int, by: bytes) -> bytes:
    return whole[:start] + (by * (stop - start))[: stop - start] + whole[stop:]


@pytest.mark.parametrize(("start", "stop", "by"), [(0, 4, b"\xff"), (4, 8, b"TFL9"), (0, 200, b"\0"), (8, 400, b"\xff"), (64, 2000, b"\x7f")])
def test_a_graph_that_is_damaged(start: int, stop: int, by: bytes, file: Path, capfd):
    file.write_bytes(damaged(file.read_bytes(), start, stop, by))
    with pytest.raises(UserError, match=r"tiny\.tflite: LiteRT can't load it, it may be cut off or no TFLite file: ") as caught:
        open_network(file)
    assert "\n" not in str(caught.value) and "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(("text", "words"), [("{}", f"its metadata {KEY} can't be read"), ("[", "can't be read"), ("", "can't be read"),
                                             ("x" * 2**21, r"holds no light_yolo\.json")])
def test_metadata_that_is_damaged(text: str, words: str, file: Path, monkeypatch):
    monkeypatch.setattr(trailer, "_MOST_BYTES", 2**20)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("light_yolo.json", text)
    with pytest.raises(UserError, match=words):
        open_network(file)


def test_one_size_only(tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("utils.export.formats.pip_install", lambda packages: None)
    with pytest.raises(UserError, match=r"^tflite: a TFLite graph holds one image size: leave out --dynamic$"):
        produce(job_of(tiny, dynamic=True), FORMATS["tflite"], tmp_path / "a", [], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


def test_its_converter_is_for_another_environment(monkeypatch):
    monkeypatch.setattr("utils.extras.is_installed", lambda package: package != "litert_torch")
    assert FORMATS["tflite"].missing().startswith("pip install litert_torch beside requirements.txt in an environment of its own")
    monkeypatch.setattr("utils.extras.is_installed", lambda package: True)
    assert FORMATS["tflite"].missing() is None


# --- where the converter is: by hand, in an environment with an older PyTorch ---------------------------------------------------------------


@needs_converter
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_export(precision: str, tiny, tmp_path: Path, capfd):
    path = produce(job_of(tiny, (64, 64), precision), FORMATS["tflite"], tmp_path / "a", check_images()[:2], tiny, CPU)
    assert open_network(path).metadata.precision == precision and "".join(capfd.readouterr()).count("\n") == 1


@needs_converter
@pytest.mark.slow
@pytest.mark.parametrize("cfg", sorted(path.name for path in MODELS.glob("*.yaml") if path.stem not in ("yolov5l", "yolov5x")))
def test_every_network(cfg: str, tmp_path: Path):
    assert_exports(cfg, tmp_path, "tflite")
