"""TensorRT engines. `fake_tensorrt.py` stands in for TensorRT and host memory for a GPU's; the tests marked gpu take the real ones."""
from __future__ import annotations

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
import hubconf
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
    """Two GPUs and TensorRT."""
    cuda = SimpleNamespace(is_available=lambda: True, current_device=lambda: 0, device=lambda place: nullcontext(),
                           stream=lambda stream: nullcontext(), Stream=lambda: SimpleNamespace(cuda_stream=7),
                           get_device_name=lambda place: "NVIDIA Some GPU")
    acting = SimpleNamespace(cuda=cuda, device=lambda name: CPU, from_numpy=torch.from_numpy, empty=torch.empty)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(tensorrt, "import_extra", lambda package: {"torch": acting, "tensorrt": fake_tensorrt}[package])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


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
    assert network.names == tiny.names and network.batch == 2 and network.description == f"TensorRT 11.4.0, NVIDIA Some GPU, {precision} file"
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
    for device, precision in (("", "auto"), ("0", "fp16"), ("cuda:1", "bf16")):  # what an engine computes in it was built for
        detector = Detector(file, device=device, precision=precision)
        assert detector.weights.network.device == ("cuda:1" if "1" in device else "cuda:0")
        found = detector(image, conf=0.01)[0]
        own = Detector(checkpoint, precision="fp32", device="cpu")(image, conf=0.01, imgsz=64)[0]
        assert len(found.xyxy) and found.names == tiny.names
        np.testing.assert_allclose(found.conf, own.conf, atol=1e-4)
        np.testing.assert_allclose(found.xyxy, own.xyxy, atol=1e-2)
    data = data_yaml(tmp_path)
    flags = ["--weights", str(file), "--project", str(tmp_path / "runs"), "--device", "0", "--half"]
    assert detect.main([*flags, "--source", str(data.parent / "images" / "val"), "--save-txt"]) == 0
    assert "TensorRT 11.4.0" in "".join(capfd.readouterr())
    assert val.main([*flags, "--data", str(data), "--noplots", "--workers", "0"]) == 0
    assert "mAP" in capfd.readouterr().out

    hub = hubconf.custom(str(file), _verbose=False)
    assert hub.to("cuda:0") is hub and hub.cuda() is hub
    for device, words in {"cpu": "is open on cuda:0: open it anew", "cuda:1": "is open on cuda:0", "cuda:2": "there are 2 CUDA devices"}.items():
        with pytest.raises(UserError, match=f"^--device {device.removeprefix('cuda:') if '2' in device else device}: .*{words}"):
            hub.to(device)
    assert detect.main(["--weights", str(file), "--source", str(data.parent / "images" / "val"), "--device", "cpu"]) == 2
    assert re.search(r"tiny\.engine: an engine runs on the NVIDIA GPU .*: leave out --device cpu, or use another format\n$", capfd.readouterr().err)


@pytest.mark.usefixtures("acted")
@pytest.mark.parametrize("driver", [True, False])
def test_tensorrt_that_cant_start(driver: bool, tiny, tmp_path: Path, monkeypatch):
    """A driver that is too old tells the logger alone; a release that is too old lacks what is called."""
    path = written(tiny, tmp_path / "right")
    monkeypatch.setattr(fake_tensorrt.Started, "driver", driver)
    if driver:
        monkeypatch.setattr(fake_tensorrt, "__version__", "8.6.1")
    words = "needs TensorRT 10 or newer, this one is 8.6.1: pip install -U tensorrt$" if driver else (
        r"TensorRT can't start on this GPU: CUDA initialization failure with error: 35$")
    with pytest.raises(UserError, match=words) as caught:
        open_network(path)
    assert "cut off" not in str(caught.value)
    with pytest.raises(UserError, match=rf"^engine: .*{words}"):
        written(tiny, tmp_path)


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
@pytest.mark.parametrize("kind", ["no input", "no output", "bf16"])
def test_an_engine_of_another_network(kind: str, tiny, tmp_path: Path, monkeypatch):
    path = written(tiny, tmp_path)
    told = {"no input": ("get_tensor_mode", fake_tensorrt.TensorIOMode.OUTPUT), "no output": ("get_tensor_mode", fake_tensorrt.TensorIOMode.INPUT),
            "bf16": ("get_tensor_dtype", "tensor(bfloat16)")}[kind]
    monkeypatch.setattr(fake_tensorrt.ICudaEngine, told[0], lambda self, name: told[1])
    with pytest.raises(UserError, match=r"a\.engine: is no detector: it has no one input and outputs in fp32 or fp16$"):
        open_network(path)


@pytest.mark.usefixtures("acted")
def test_an_engine_without_memory(tiny, tmp_path: Path, monkeypatch):
    path = written(tiny, tmp_path)
    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "create_execution_context", lambda self: None)
    with pytest.raises(UserError, match=r"a\.engine: TensorRT can't run it, perhaps for lack of memory on the GPU: it does not say why$"):
        open_network(path)


@pytest.mark.usefixtures("acted")
def test_one_size_only(tiny, tmp_path: Path):
    with pytest.raises(UserError, match=r"^engine: a TensorRT engine holds one image size: leave out --dynamic$"):
        produce(job_of(tiny, dynamic=True), FORMATS["engine"], tmp_path / "a", [], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


@NO_GPU
def test_without_a_gpu(tmp_path: Path, capfd):
    checkpoint = lively_checkpoint(tmp_path)
    assert export.main(["--weights", str(checkpoint), "--include", "engine", "torchscript", "--imgsz", "64"]) == 1
    said = capfd.readouterr()
    assert re.fullmatch(r"error: engine: not written here: it is built on the NVIDIA GPU that it is for: .*trtexec .*\n", said.err), said.err
    assert "torchscript: " in said.out and not (tmp_path / "tiny.engine").exists()
    (tmp_path / "a.engine").write_bytes(b"plan")
    images = data_yaml(tmp_path).parent / "images" / "val"
    words = r"\S*a\.engine: an engine runs on the NVIDIA GPU that it was built for: take the checkpoint here, or another format"
    for device in ("", "cpu", "0"):
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
