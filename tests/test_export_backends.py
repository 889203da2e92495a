"""Exported files as networks: from several threads at once, of other projects, cut off, or asked for what they can't."""
from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from models.weights import open_weights
from models.yolo import DetectionModel
from utils.cpu import cpu_has_native_bf16
from utils.errors import UserError
from utils.export import backends
from utils.export.backends import find_exported, is_exported, open_network
from utils.export.converters import to_onnx
from utils.export.formats import FORMATS, ExportJob
from utils.export.graph import InferenceGraph
from utils.export.metadata import KEY, ExportMetadata, stamp_onnx
from utils.extras import is_installed
from utils.files import ROOT
from utils.network import TorchRunner, to_input

onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
FLEXIBLE = ("onnx", "openvino", "torchscript", *["mnn"] * is_installed("MNN"))  # take any image size; test_export_ncnn.py has another


@pytest.fixture(scope="module")
def files(place, tiny) -> dict[str, Path]:
    """A static and a dynamic file of each format."""
    made = {}
    for dynamic in (False, True):
        for name, kind in ((name, FORMATS[name]) for name in FLEXIBLE):
            made[f"{name} {'dynamic' if dynamic else 'static'}"] = path = place / f"tiny{'-dynamic' * dynamic}{kind.suffix}"
            if kind.is_folder:
                path.mkdir()
            metadata = ExportMetadata.of(tiny, (64, 96), dynamic=dynamic, precision="fp32", source="tiny.pt")
            kind.write(ExportJob(tiny, metadata, batch_size=2, opset=17), path)
    return made


KINDS = [f"{name} {graph}" for name in FLEXIBLE for graph in ("static", "dynamic")]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_network(kind: str, files, tiny, monkeypatch):
    """Each gets the boxes of its own images, whatever the others do meanwhile."""
    monkeypatch.setattr(backends, "cpu_threads", lambda: 3)
    network = open_network(files[kind], at_once=3)
    batches = [torch.rand(1 + n % 3, 3, 64, 96) for n in range(24)]
    with torch.no_grad():
        expected = [tiny.decode(tiny(batch)) for batch in batches]
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda batch: network.decode(network(batch)), batches))
    for boxes, own in zip(found, expected, strict=True):
        torch.testing.assert_close(boxes, own, rtol=1e-4, atol=1e-4)


_FIRST_NEED = """
import sys, threading
import openvino
from utils.export.backends import open_network

network, start = open_network(sys.argv[1], at_once=2), threading.Barrier(2)

def first():
    start.wait()
    openvino.Type.f32.to_dtype()  # as each image does before anything else

threads = [threading.Thread(target=first) for _ in range(2)]
sys.setswitchinterval(1e-6)
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_openvinos_first_two_images_may_come_at_once(files):
    """Its bindings to NumPy are made at the first need: two threads that need them first hang in seven of eight processes (2026.4)."""
    for _ in range(4):
        subprocess.run([sys.executable, "-c", _FIRST_NEED, str(files["openvino static"])], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_and_results_are_the_callers_own(kind: str, files, tiny):
    network = open_network(files[kind])
    images = torch.rand(2, 3, 64, 96).to(memory_format=torch.channels_last)
    first = network(images)
    kept = first.clone()
    network(images * 0.5)
    assert torch.equal(first, kept) and not torch.equal(first, network(images * 0.5))
    torch.testing.assert_close(first, tiny.decode(tiny(images)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_in_boxes_out(kind: str, files, tiny):
    """As detection runs it: arrays, the same boxes as tensors give, to the last bit, and as the checkpoint finds."""
    network = open_network(files[kind])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)
    found = network.run(pixels, 0.25)
    images = to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.device("cpu"))
    for boxes, same, own in zip(found, network(images), TorchRunner(tiny, "cpu").run(pixels, 0.25), strict=True):
        assert boxes.dtype == np.float32
        np.testing.assert_array_equal(boxes, same.numpy())
        np.testing.assert_allclose(boxes, own, rtol=1e-4, atol=1e-4)
    with network.threads() as (pool, workers):
        assert workers == network.at_once and len(pool.submit(network.run, pixels, 0.25).result()) == 3


@pytest.mark.parametrize("name", FLEXIBLE)
def test_a_static_file_takes_its_own_size_only(name: str, files):
    network = open_network(files[f"{name} static"])
    with pytest.raises(UserError, match=r"takes images of 64x96 px only, not of 96x64: export it with --dynamic, or with --imgsz 96 64$"):
        network(torch.rand(1, 3, 96, 64))
    weights = open_weights(str(files[f"{name} static"]), "", "fp32")
    assert weights.image_size(None) == weights.image_size((64, 96)) == weights.image_size((60, 90)) == (64, 96)
    with pytest.raises(UserError, match=r"takes images of 64x96 px only: leave out --imgsz, or export it with --imgsz 128 128 or --dynamic"):
        weights.image_size((128,))
    assert weights.val_size(None) == (64, 96)
    with pytest.raises(UserError, match=r"takes images of 64x96 px only: leave out --imgsz"):
        weights.val_size(96)


@pytest.mark.parametrize("name", FLEXIBLE)
def test_a_dynamic_file_takes_any_size(name: str, files):
    weights = open_weights(str(files[f"{name} dynamic"]), "cpu", "fp32")
    assert (weights.fixed, weights.pad_stride, weights.max_stride, weights.imgsz) == (None, 32, 32, (64, 96))
    assert weights.image_size(None) == (64, 96) and weights.image_size((100,)) == (128, 128) and weights.val_size(None) == 96
    assert weights.names == ("red", "green") and name in weights.description.lower()


def test_the_checkpoints_own_door(shared):
    weights = open_weights(str(shared / "weights" / "yolov5n.pt"), "cpu", "fp32")
    assert weights.image_size(None) == (640, 640) and weights.val_size(100) == 128 and (weights.pad_stride, weights.fixed) == (32, None)


def test_no_other_device(files):
    with pytest.raises(UserError, match=r"^--device 0: tiny\.onnx runs on the CPU"):
        open_weights(str(files["onnx static"]), "0", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_computes_in_the_precision_asked_for(precision: str, files, monkeypatch):
    monkeypatch.setattr(backends, "cpu_threads", lambda: 2)
    weights = open_weights(str(files["openvino static"]), "", precision, at_once=2)
    assert f", {precision}, 2 threads" in weights.description
    compiled = weights.network._session._compiled
    settings = {name: str(compiled.get_property(name)) for name in ("NUM_STREAMS", "INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING")}
    assert settings == {"NUM_STREAMS": "2", "INFERENCE_NUM_THREADS": "2", "ENABLE_CPU_PINNING": "False"}
    native = precision == "fp32" or cpu_has_native_bf16()
    assert not native or {"fp32": "float32", "bf16": "bfloat16"}[precision] in str(compiled.get_property("INFERENCE_PRECISION_HINT"))


# --- files of other projects ---------------------------------------------------------------------------------------------------------------


def without_metadata(tiny: DetectionModel, path: Path, **props: str) -> Path:
    """As YOLOv5 itself exports: its names and stride as Python literals, or nothing."""
    to_onnx(InferenceGraph(tiny), torch.zeros(1, 3, 64, 64), path, dynamic=True, opset=17)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, props)
    onnx.save(model, path)
    return path


def test_yolov5s_own_onnx(tiny, tmp_path: Path):
    path = without_metadata(tiny, tmp_path / "a.onnx", stride="64", names="{0: 'cat', 1: 'dog'}")
    network = open_network(path, names=lambda: pytest.fail("the file tells its names itself"))
    assert (network.names, network.max_stride, network.pad_stride, network.imgsz, network.metadata) == (("cat", "dog"), 64, 64, None, None)


def test_a_size_that_is_not_in_whole_strides(tiny, tmp_path: Path):
    """Of a file that takes no other, of another project: ours are in whole strides."""
    (tmp_path / "my.yaml").write_text("train: images\nnames: [cat, dog]\n")
    to_onnx(InferenceGraph(tiny), torch.zeros(1, 3, 100, 100), tmp_path / "a.onnx", opset=17)
    weights = open_weights(str(tmp_path / "a.onnx"), "", "fp32", str(tmp_path / "my.yaml"))
    assert weights.image_size(None) == weights.image_size((100,)) == (100, 100) and weights.val_size(None) == 100
    with pytest.raises(UserError, match="takes images of 100x100 px only"):
        weights.image_size((96,))


def test_names_that_are_no_literal(tiny, tmp_path: Path):
    path = without_metadata(tiny, tmp_path / "a.onnx", names=f"1{'0' * 400}+1j")
    with pytest.raises(UserError, match="tells no class names"):
        open_network(path)


def test_a_graph_without_outputs(tiny, tmp_path: Path):
    path = without_metadata(tiny, tmp_path / "a.onnx", names="['red', 'green']")
    model = onnx.load(path)
    del model.graph.output[:]
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"its output is \?, where"):
        open_network(path)


def test_a_name_that_is_no_utf8(files, tmp_path: Path):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/b\xff.onnx"))
    try:
        path.write_bytes(files["onnx static"].read_bytes())
    except OSError:
        pytest.skip("no such names on this file system")
    with pytest.raises(UserError, match="name is no UTF-8: rename it"):
        open_network(path)


def test_a_file_without_names(tiny, tmp_path: Path):
    path = without_metadata(tiny, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"a\.onnx: its metadata tells no class names .*--data"):
        open_network(path)
    network = open_network(path, names=lambda: ["cat", "dog"])
    assert (network.names, network.max_stride) == (("cat", "dog"), 32)
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 63, 7)
    (tmp_path / "my.yaml").write_text("train: images\nnames: [cat, dog]\n")
    assert open_weights(str(path), "", "fp32", str(tmp_path / "my.yaml")).names == ("cat", "dog")
    with pytest.raises(UserError, match=r"of its 3 classes has images x boxes x 8: .*--data of other classes"):
        open_network(path, names=lambda: ["a", "b", "c"])(torch.rand(1, 3, 32, 32))


class Final(nn.Module):
    """Two boxes of one class, as another project's graph with suppression gives them: x1, y1, x2, y2, confidence, class number."""

    def forward(self, images: Tensor) -> Tensor:
        boxes = torch.tensor([[[3.0, 4, 20, 30, 0.9, 0], [40, 4, 60, 30, 0.5, 0]]])
        return boxes + 0 * images.mean()


@pytest.mark.parametrize("told", [{}, {"end2end": "True"}, {"args": "{'batch': 1, 'nms': True}"}])
def test_final_boxes_of_another_project(told: dict[str, str], tmp_path: Path):
    to_onnx(Final(), torch.zeros(1, 3, 64, 64), tmp_path / "a.onnx", opset=17)
    model = onnx.load(tmp_path / "a.onnx")
    onnx.helper.set_model_props(model, {"names": "{0: 'cat'}", "stride": "32", "args": "{'nms': False}"} | told)
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"a\.onnx: holds final boxes, suppressed in another project's way: export it there without"):
        open_network(tmp_path / "a.onnx")(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(("session", "callers", "own"), [
    ("NcnnSession", 4, 2), ("TfliteSession", 4, 2), ("OnnxSession", 4, 5), ("TfliteSession", 1, 8)
])  # fmt: skip
def test_eight_cores_have_eight_threads(session: str, callers: int, own: int, tiny, tmp_path: Path):
    """ONNX Runtime's callers share one pool; ncnn and LiteRT keep threads for each of theirs."""
    if session == "TfliteSession":
        pytest.importorskip("ai_edge_litert")
        assert backends.TfliteSession(Path(__file__).with_name("tiny.tflite"), 8, callers)._threads == own
    elif session == "OnnxSession":
        path = without_metadata(tiny, tmp_path / "a.onnx")
        assert backends.OnnxSession(path, 8, callers)._session.get_session_options().intra_op_num_threads == own
    else:
        pytest.importorskip("ncnn"), pytest.importorskip("pnnx")
        FORMATS["ncnn"].write(ExportJob(tiny, ExportMetadata.of(tiny, (64, 64), dynamic=False, precision="fp32", source="a.pt")), tmp_path)
        assert backends.NcnnSession(tmp_path / "a.ncnn.param", 8, callers)._net.opt.num_threads == own


def test_names_beside_an_openvino_model(tiny, tmp_path: Path):
    folder = tmp_path / "best_openvino_model"
    folder.mkdir()
    FORMATS["openvino"].write(ExportJob(tiny, ExportMetadata.of(tiny, (64, 64), dynamic=False, precision="fp32", source="best.pt")), folder)
    text = (folder / "best.xml").read_text()
    for key in (KEY, "names", "stride"):
        start = text.index(f"<{key} ")
        text = text[:start] + text[text.index("/>", start) + 2 :]
    (folder / "best.xml").write_text(text)
    with pytest.raises(UserError, match=r"best\.xml: its metadata tells no class names"):
        open_network(folder)
    (folder / "best.yaml").write_text("stride: 32\nnames:\n  0: cat\n  1: dog\n")
    assert open_network(folder).names == ("cat", "dog")


@pytest.mark.parametrize("place", ["model", "beside"])
def test_final_boxes_of_another_projects_openvino_model(place: str, tmp_path: Path):
    openvino = pytest.importorskip("openvino")
    to_onnx(Final(), torch.zeros(1, 3, 64, 64), tmp_path / "a.onnx", opset=17)
    model = openvino.convert_model(str(tmp_path / "a.onnx"))
    told = {"names": {0: "cat"}, "stride": 32, "args": {"nms": True}}
    if place == "model":
        for key, value in told.items():
            model.set_rt_info(str(value), [key])
    openvino.save_model(model, tmp_path / "a" / "a.xml")
    if place == "beside":
        (tmp_path / "a" / "metadata.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(UserError, match=r"a\.xml: holds final boxes, suppressed in another project's way: export it there without"):
        open_network(tmp_path / "a")


def test_what_lies_beside_our_own_openvino_model_is_not_read(files, tmp_path: Path):
    folder = tmp_path / files["openvino static"].name
    shutil.copytree(files["openvino static"], folder)
    (folder / "notes.yaml").write_text("names: [")
    assert open_network(folder).names == ("red", "green")


def test_fp16_images(tiny, tmp_path: Path):
    """YOLOv5's --half files take and give fp16."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = InferenceGraph(tiny)

        def forward(self, images: Tensor) -> Tensor:
            return self.graph(images.float()).half()

    to_onnx(Half(), torch.zeros(1, 3, 64, 64).half(), tmp_path / "half.onnx", opset=17)
    images = torch.rand(1, 3, 64, 64)
    boxes = open_network(tmp_path / "half.onnx", names=lambda: tiny.names)(images)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, tiny.decode(tiny(images)), rtol=2e-2, atol=0.3)


@pytest.mark.parametrize(("module", "shape", "words"), [
    (nn.Flatten(), (1, 3, 64, 64), r"its output is 1 x 12288, where a YOLOv5-like detector of its 2 classes has images x boxes x 7"),
    (nn.Flatten(2), (1, 3, 64, 64), r"its output is 1 x 3 x 4096, where"),
    (nn.Identity(), (1, 1, 8, 8), "does not take one batch of images x 3 x height x width"),
    (nn.Linear(4, 4), (1, 4), "does not take one batch of images"),
])  # fmt: skip
def test_other_networks(module: nn.Module, shape: tuple[int, ...], words: str, tmp_path: Path):
    to_onnx(module.eval(), torch.zeros(shape), tmp_path / "a.onnx")
    with pytest.raises(UserError, match=rf"a\.onnx: {words}"):
        open_network(tmp_path / "a.onnx", names=lambda: ["cat", "dog"])


@pytest.mark.parametrize("count", [0, 2])
def test_not_one_input(count: int, tmp_path: Path):
    helper, one = onnx.helper, onnx.TensorProto.FLOAT
    value = helper.make_tensor("c", one, (1,), (1.0,))
    inputs = [helper.make_tensor_value_info(f"i{n}", one, (1, 3, 64, 64)) for n in range(count)]
    graph = helper.make_graph([helper.make_node("Constant", [], ["o"], value=value)], "g", inputs, [helper.make_tensor_value_info("o", one, (1,))])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "a.onnx")
    with pytest.raises(UserError, match="does not take one batch of images"):
        open_network(tmp_path / "a.onnx", names=lambda: ["cat"])


def test_metadata_of_a_newer_program(tiny, tmp_path: Path):
    path = without_metadata(tiny, tmp_path / "a.onnx", **{KEY: '{"format": "light-yolo export", "version": 9}'})
    with pytest.raises(UserError, match=r"a\.onnx: is of a newer format version"):
        open_network(path)


# --- broken and missing files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize(("kind", "inside"), [("onnx static", ""), ("openvino static", "tiny.xml"), ("openvino static", "tiny.bin")])
def test_files_cut_off(kind: str, inside: str, share: float, files, tmp_path: Path, capfd):
    source = files[kind]
    copy = tmp_path / source.name
    if source.is_dir():
        copy.mkdir()
        for file in source.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    else:
        copy.write_bytes(source.read_bytes())
    cut = copy / inside if inside else copy
    whole = cut.read_bytes()
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"can't load it, it may be cut off") as caught:
        open_network(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)
    assert "".join(capfd.readouterr()) == ""


def test_what_is_not_there(files, tmp_path: Path):
    for name in ("none.onnx", "none_openvino_model", "none.xml"):
        with pytest.raises(UserError, match=rf"{name}: no such exported network .*looked at"):
            open_network(tmp_path / name)
    (tmp_path / "a_openvino_model").mkdir()
    with pytest.raises(UserError, match=r"a_openvino_model: holds no \.xml files"):
        open_network(tmp_path / "a_openvino_model")
    (tmp_path / "a_openvino_model" / "a.xml").write_bytes((files["openvino static"] / "tiny.xml").read_bytes())
    with pytest.raises(UserError, match=r"a\.xml: its weights a\.bin are missing"):
        open_network(tmp_path / "a_openvino_model")
    (tmp_path / "a_openvino_model" / "b.xml").write_text("")
    with pytest.raises(UserError, match=r"holds 2 \.xml files"):
        open_network(tmp_path / "a_openvino_model")


def test_which_files_are_exported(files):
    assert all(map(is_exported, ("a.onnx", "a.torchscript", "x/best_openvino_model", "x/best_openvino_model/", "a.xml")))
    assert not any(map(is_exported, ("a.pt", "runs/exp", "best_openvino_model/a.pt")))
    folder = files["openvino static"]
    assert find_exported(folder) == find_exported(f"{folder}/") == find_exported(folder / "tiny.xml") == folder / "tiny.xml"


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_a_runtime_that_is_not_installed(package: str, files, monkeypatch):
    def absent(name: str):
        raise UserError(f"needs {name}: pip install {name}")

    monkeypatch.setattr("utils.export.sessions.import_extra", absent)
    with pytest.raises(UserError, match=f"pip install {package}"):
        open_network(files[f"{'onnx' if package == 'onnxruntime' else package} static"])


def test_metadata_that_contradicts_the_graph(tiny, tmp_path: Path):
    path = without_metadata(tiny, tmp_path / "a.onnx")
    metadata = ExportMetadata.of(tiny, (64, 64), dynamic=True, precision="fp32", source="a.pt")
    stamp_onnx(path, dataclasses.replace(metadata, names=("a", "b", "c")))
    with pytest.raises(UserError, match="of its 3 classes"):
        open_network(path)(torch.from_numpy(np.zeros((1, 3, 64, 64), np.float32)))
