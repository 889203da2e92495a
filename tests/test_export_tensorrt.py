"""TensorRT engines. `fake_tensorrt.py` stands in for TensorRT and host memory for a GPU's; the tests marked gpu take the real ones."""
from __future__ import annotations

import dataclasses
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import fake_tensorrt
import numpy as np
import pytest
import torch
from exporting import assert_cut_off_is_told, assert_exports, job_of
from tiny import data_yaml, lively_checkpoint

import detect
import export
import val
from models.detector import Detector
from utils.errors import UserError
from utils.export import formats, tensorrt
from utils.export.backends import find_exported, is_exported, open_network
from utils.export.check import check_images
from utils.export.formats import FORMATS
from utils.export.produce import produce
from utils.export.trailer import read_trailer

onnx = pytest.importorskip("onnx")
CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device")


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and TensorRT."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(tensorrt, "_cuda", lambda path, torch, device: CPU)
    monkeypatch.setattr("models.weights.select_device", lambda device: CPU)
    for name, act in {"device": lambda device: nullcontext(), "stream": lambda stream: nullcontext(),
                      "Stream": lambda: SimpleNamespace(cuda_stream=7), "get_device_name": lambda device: "NVIDIA Some GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, act)
    monkeypatch.setitem(FORMATS, "engine", dataclasses.replace(FORMATS["engine"], write=formats.write_engine, elsewhere=""))


def written(tiny, folder: Path, precision: str = "fp32") -> Path:
    return produce(job_of(tiny, precision=precision), FORMATS["engine"], folder / "a", check_images()[:3], tiny, CPU)


@pytest.mark.usefixtures("acted")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_and_what_it_finds(precision: str, tiny, tmp_path: Path, capfd):
    path = written(tiny, tmp_path, precision)
    said = "".join(capfd.readouterr())
    assert re.fullmatch(rf"engine: TensorRT times its kernels .*\nengine: {path}: [\d.]+ MiB, .* have their partner\n", said), said
    assert path.name == "a.engine" and is_exported(path) and find_exported(path) == path and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert fake_tensorrt.flags == []  # no TF32

    network = open_network(path)
    assert network.metadata == job_of(tiny, precision=precision).metadata and network.fixed == network.imgsz == (64, 96)
    assert network.names == tiny.names and network.batch == 2 and network.description == "TensorRT 11.4.0, NVIDIA Some GPU"
    images = torch.rand(3, 3, 64, 96)  # more than its batch, and not a multiple of it
    atol = 1e-3 if precision == "fp32" else 0.3
    torch.testing.assert_close(network(images), tiny.decode(tiny(images)), rtol=1e-3, atol=atol)


@pytest.mark.usefixtures("acted")
def test_half_is_the_networks_and_not_the_boxes(tiny, tmp_path: Path):
    path = written(tiny, tmp_path, "fp16")
    model = onnx.load_from_string(path.read_bytes()[12 : read_trailer(path).start])
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convs and all(types[node.input[1]] == onnx.TensorProto.FLOAT16 for node in convs)
    assert model.graph.input[0].type.tensor_type.elem_type == model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.usefixtures("acted")
def test_it_takes_the_paths_of_a_checkpoint(tiny, tmp_path: Path, capfd):
    checkpoint, file = lively_checkpoint(tmp_path), tmp_path / "tiny.engine"
    assert export.main(["--weights", str(checkpoint), "--include", "engine", "--imgsz", "64", "--simplify"]) == 0
    assert f"python detect.py --weights {file} --source" in capfd.readouterr().out
    image = check_images()[0][:192, :192]  # the checkpoint pads to no more than the engine then
    for device in ("", "0"):  # of an engine it is the GPU's number
        found = Detector(file, device=device)(image, conf=0.01)[0]
        own = Detector(checkpoint, precision="fp32", device="cpu")(image, conf=0.01, imgsz=64)[0]
        assert len(found.xyxy) and found.names == tiny.names
        np.testing.assert_allclose(found.conf, own.conf, atol=1e-4)
        np.testing.assert_allclose(found.xyxy, own.xyxy, atol=1e-2)
    data = data_yaml(tmp_path)
    flags = ["--weights", str(file), "--project", str(tmp_path / "runs"), "--device", "0"]
    assert detect.main([*flags, "--source", str(data.parent / "images" / "val"), "--save-txt"]) == 0
    assert "TensorRT 11.4.0" in "".join(capfd.readouterr())
    assert val.main([*flags, "--data", str(data), "--noplots", "--workers", "0"]) == 0
    assert "mAP" in capfd.readouterr().out


@pytest.mark.usefixtures("acted")
def test_an_engine_that_finds_other_boxes(tiny, tmp_path: Path, monkeypatch):
    right = fake_tensorrt.IExecutionContext._memory
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "_memory", lambda self, name: right(self, name)[..., ::-1])
    with pytest.raises(UserError, match=r"^engine: does not find what the checkpoint finds: .* kept aside as .*a\.mismatch\.engine$"):
        written(tiny, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mismatch.engine"]


@pytest.mark.usefixtures("acted")
def test_an_engine_that_cant_be_built(tiny, tmp_path: Path, monkeypatch):
    def write(data: bytes):
        def to(job, path: Path) -> None:
            path.write_bytes(data)
        return to

    monkeypatch.setattr(formats, "write_onnx", write(b"\xff\xff"))
    with pytest.raises(UserError, match=r"^engine: this network can't be converted: node_1: ") as caught:
        written(tiny, tmp_path)
    monkeypatch.setattr(formats, "write_onnx", write(b"too large"))
    monkeypatch.setattr(onnx.checker, "check_model", lambda model: None)
    with pytest.raises(UserError, match=r"TensorRT builds no engine: Could not find any implementation for node Conv_0\.$"):
        written(tiny, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("acted")
@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_an_engine_that_is_cut_off(share: float, tiny, tmp_path: Path, capfd):
    path = written(tiny, tmp_path)
    capfd.readouterr()
    assert_cut_off_is_told(path, share, r"a\.engine: TensorRT can't load it, it is cut off, or built by another release of TensorRT or for another "
                           r"GPU: export it again here: IRuntime::deserializeCudaEngine: Error Code 1", capfd)


@pytest.mark.usefixtures("acted")
def test_an_engine_that_fails(tiny, tmp_path: Path, monkeypatch):
    network = open_network(written(tiny, tmp_path))
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", lambda self, stream_handle: False)
    with pytest.raises(UserError, match=r"a\.engine: fails on images of 64x96 px: it does not say why$"):
        network(torch.zeros(2, 3, 64, 96))


@pytest.mark.usefixtures("acted")
def test_an_engine_of_trtexec_has_the_names_of_data(tiny, tmp_path: Path):
    path = written(tiny, tmp_path)
    path.write_bytes(path.read_bytes()[: read_trailer(path).start])
    with pytest.raises(UserError, match=r"a\.engine: its metadata tells no class names .*: name them with --data"):
        open_network(path)
    network = open_network(path, names=lambda: ("one", "two"))
    images = torch.rand(2, 3, 64, 96)
    assert network.names == ("one", "two") and network.fixed == (64, 96) and network.max_stride == 32
    torch.testing.assert_close(network(images), tiny.decode(tiny(images)), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("acted")
def test_one_size_only(tiny, tmp_path: Path):
    with pytest.raises(UserError, match=r"^engine: a TensorRT engine holds one image size and batch; without --dynamic it may go$"):
        produce(job_of(tiny, dynamic=True), FORMATS["engine"], tmp_path / "a", [], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


@NO_GPU
def test_without_a_gpu(tmp_path: Path, capfd):
    checkpoint = lively_checkpoint(tmp_path)
    assert export.main(["--weights", str(checkpoint), "--include", "engine", "torchscript", "--imgsz", "64"]) == 1
    said = capfd.readouterr()
    assert re.fullmatch(r"error: engine: not written here: TensorRT builds on the NVIDIA GPU that it is for: .*trtexec .*\n", said.err), said.err
    assert "torchscript: " in said.out and not (tmp_path / "tiny.engine").exists()
    (tmp_path / "a.engine").write_bytes(b"plan")
    images = data_yaml(tmp_path).parent / "images" / "val"
    elsewhere = r"\S*a\.engine: an engine runs on the NVIDIA GPU that it was built for: take the checkpoint here, or another format"
    for device, words in {"": elsewhere, "cpu": elsewhere, "0": "--device 0: PyTorch .* sees no CUDA device here: use --device cpu"}.items():
        assert detect.main(["--weights", str(tmp_path / "a.engine"), "--source", str(images), "--device", device]) == 2
        assert re.fullmatch(rf"error: {words}\n", capfd.readouterr().err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cfg", ["yolov5n.yaml", "yolov5s-ghost.yaml", "yolov5s-shuffle.yaml"])
def test_on_a_gpu(cfg: str, tmp_path: Path):
    pytest.importorskip("tensorrt")
    assert_exports(cfg, tmp_path, "engine")
    own = tmp_path / "own.pt"
    assert export.main(["--weights", str(own), "--include", "engine", "--imgsz", "64", "--half", "--batch-size", "4"]) == 0
    assert open_network(tmp_path / "own.engine").metadata.precision == "fp16"
