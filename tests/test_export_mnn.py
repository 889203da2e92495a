"""MNN files: what the network finds, in MNN's own runtime, nothing told to its makers; and every way in which such a file can be wrong."""
from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from exporting import assert_cut_off_is_told, assert_exports, job_of
from torch import Tensor, nn

from models.weights import open_weights
from models.yolo import DetectionModel
from utils.errors import UserError
from utils.export import backends, converters
from utils.export.backends import is_exported, open_network
from utils.export.check import check_images
from utils.export.converters import to_mnn, to_onnx
from utils.export.formats import FORMATS
from utils.export.graph import InferenceGraph
from utils.export.metadata import KEY
from utils.export.produce import produce

pytest.importorskip("MNN")
CPU = torch.device("cpu")
YAMLS = sorted(str(path) for path in (Path(__file__).resolve().parents[1] / "models").glob("**/*.yaml"))


@pytest.fixture
def file(tiny, tmp_path: Path) -> Path:
    FORMATS["mnn"].write(job_of(tiny), tmp_path / "tiny.mnn")
    return tmp_path / "tiny.mnn"


def test_what_is_written_and_found(file: Path, tiny):
    network = open_network(file)
    assert network.metadata == job_of(tiny).metadata and network.fixed == network.imgsz == (64, 96) and network.names == tiny.names
    assert network.batch == job_of(tiny).batch_size == 2 and is_exported("x/best.mnn")
    images = torch.rand(3, 3, 64, 96)
    torch.testing.assert_close(network.decode(network(images)), tiny.decode(tiny(images)), rtol=1e-4, atol=1e-3)
    assert open_weights(str(file), "", "fp32").description.startswith("MNN ")


def test_earlier_boxes_stay(file: Path):
    """MNN computes each batch into the memory of the one before."""
    network = open_network(file)
    first = network(torch.zeros(2, 3, 64, 96).numpy())
    kept = first.copy()
    assert (network(torch.rand(2, 3, 64, 96).numpy()) != first).any() and (first == kept).all()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 3)])
def test_one_core_is_left_alone(cores: int, threads: int, file: Path, monkeypatch):
    monkeypatch.setattr(backends, "cpu_threads", lambda: cores)
    assert open_network(file).description.endswith(f", fp32, {threads} threads")


def test_half_is_half_the_file(tiny, tmp_path: Path):
    sizes = []
    for precision in ("fp32", "fp16"):
        path = produce(job_of(tiny, (64, 64), precision), FORMATS["mnn"], tmp_path / precision, check_images()[:2], tiny, CPU)
        sizes.append(path.stat().st_size)
        found = open_network(path).description
        assert found.endswith(" threads, fp16 file") if precision == "fp16" else ", fp32, " in found and found.endswith(" threads")
    weights = sum(module.weight.numel() for module in tiny.modules() if isinstance(module, nn.Conv2d))
    assert sizes[0] - sizes[1] > 1.8 * weights


def test_its_makers_hear_nothing(tiny, tmp_path: Path, monkeypatch):
    """MNN.tools installs a package with pip and reports over the network: a pip that leaves a trace is not called."""
    (tmp_path / "bin").mkdir()
    pip = tmp_path / "bin" / "pip"
    pip.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", f"{pip.parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["pip"], check=True)
    (tmp_path / "called").unlink()
    FORMATS["mnn"].write(job_of(tiny), tmp_path / "tiny.mnn")
    open_network(tmp_path / "tiny.mnn")
    assert not (tmp_path / "called").exists()


def test_what_mnn_computes_wrongly(tiny, tmp_path: Path):
    """It converts an operator that it doesn't know without a word."""
    class Exotic(DetectionModel):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [torch.linalg.det(raw[..., :5, :5])[..., None, None].expand_as(raw) for raw in super().forward(images)]

    with pytest.raises(UserError, match=r"^mnn: does not find what the checkpoint finds: "):
        produce(job_of(Exotic(tiny.spec, tiny.names).eval(), (256, 256)), FORMATS["mnn"], tmp_path / "a", check_images()[:1], tiny, CPU)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mismatch.mnn"]


def test_a_converter_that_fails(file: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "no.onnx").write_bytes(b"no ONNX file")
    with pytest.raises(RuntimeError, match="MNN's converter ends with "):
        to_mnn(tmp_path / "no.onnx", tmp_path / "b.mnn", "")
    monkeypatch.setattr(converters, "_CONVERT_TO_MNN", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="MNN's converter ends with 3: it says nothing"):
        to_mnn(file, tmp_path / "b.mnn", "")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_files_cut_off(share: float, file: Path, capfd):
    assert_cut_off_is_told(file, share, r"tiny\.mnn: MNN can't load it, .*cut off", capfd)


@pytest.mark.parametrize(("change", "words"), [
    ({KEY: None}, None), ({KEY: None, "names": None}, "tells no class names"), ({KEY: [1]}, f"its metadata {KEY} can't be read"),
    ({KEY: None, "names": {"0": "a", "1": "b", "2": "c"}}, "of its 3 classes has images x boxes x 8"),
    ({KEY: None, "end2end": True}, "suppressed in another project's way"), ("MNN", "tells no class names"), ("[1]", "tells no class names"),
    ("[" * 100_000, "tells no class names"), ({KEY: None, "names": {"0" * 5000: "a", "1": "b"}}, "tells no class names"),
    ({KEY: None, "names": {"0": "a", "2": "b"}}, "tells no class names"), ({KEY: None, "names": ["a", "\ud800"]}, "tells no class names"),
])  # fmt: skip
def test_what_it_says_of_itself(change: dict | str, words: str | None, tiny, tmp_path: Path):
    """Of files of other projects too, which keep their YAML's content there as JSON."""
    job, path = job_of(tiny), tmp_path / "other.mnn"
    to_onnx(InferenceGraph(tiny), job.example(), tmp_path / "a.onnx")
    content = change if isinstance(change, str) else {key: value for key, value in (job.metadata.to_content() | change).items() if value is not None}
    to_mnn(tmp_path / "a.onnx", path, content if isinstance(change, str) else json.dumps(content))
    if words is None:
        assert open_network(path).names == ("red", "green") and open_network(path).fixed == (64, 96)
    else:
        with pytest.raises(UserError, match=words):
            open_network(path)(torch.rand(2, 3, 64, 96))


def test_text_that_is_no_utf8(file: Path):
    """MNN's own reader of it ends the process."""
    content = file.read_bytes()
    assert content.count(b'"red"') == 2  # for other programs, and in ours
    file.write_bytes(content.replace(b'"red"', b'"r\xffd"'))
    with pytest.raises(UserError, match="tells no class names"):
        open_network(file)


def test_each_free_side_by_itself(tiny, tmp_path: Path):
    """Of another project's file: free sides do not make its batch free."""
    job = job_of(tiny, dynamic=True)
    to_onnx(InferenceGraph(tiny), job.example()[:1], tmp_path / "a.onnx", dynamic=True)
    for text, batch in ((json.dumps(job.metadata.to_content()), None), (json.dumps({"names": ["a", "b"]}), 1)):
        to_mnn(tmp_path / "a.onnx", tmp_path / "a.mnn", text)
        network = open_network(tmp_path / "a.mnn")
        assert (network.batch, network.fixed) == (batch, None) and network(torch.rand(2, 3, 32, 64)).shape[0] == 2


def test_a_full_disk(file: Path, tiny, tmp_path: Path, monkeypatch):
    """The converter itself writes what has room and is content."""
    def no_room(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    to_onnx(InferenceGraph(tiny), job_of(tiny).example(), tmp_path / "a.onnx")
    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(OSError, match="No space left"):
        to_mnn(tmp_path / "a.onnx", tmp_path / "b.mnn", "")


def test_another_network(tiny, tmp_path: Path):
    graph = nn.Sequential(nn.Conv2d(3, 4, 1))
    with converters.quiet():
        torch.onnx.export(graph, (torch.rand(1, 3, 8, 8),), str(tmp_path / "a.onnx"), input_names=["x"], output_names=["y"], dynamo=False)
    to_mnn(tmp_path / "a.onnx", tmp_path / "a.mnn", "")
    with pytest.raises(UserError, match=r"no MNN file of a detector, from images to output0$"):
        open_network(tmp_path / "a.mnn")


@pytest.mark.slow
@pytest.mark.parametrize("cfg", YAMLS, ids=lambda path: Path(path).stem)
def test_every_yaml(cfg: str, tmp_path: Path):
    if "timm" in cfg:
        pytest.importorskip("timm")
    assert_exports(cfg, tmp_path, "mnn", rtol=1e-2 if "swin" in cfg else 1e-3)  # its GELU is 0.0005 off, and Swin has many
