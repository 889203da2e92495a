"""Int8 files: near their float ones, their decoding untouched, calibrated on what validation sees, and given up only when nothing helps."""
from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import lively, picture_split, tiny_model
from torch import Tensor

from models.spec import load_spec
from models.yolo import DetectionModel
from utils.compress.calibration import CalibrationImages
from utils.compress.int8 import QUANTIZERS, Int8Files, Scores, attempts, best_attempt, int8_format, put
from utils.compress.rounding import SILU_FLOOR
from utils.compress.tail import find_tail, silu_inputs, with_activation
from utils.config import QuantizeConfig
from utils.data.open import val_loader
from utils.errors import UserError
from utils.export.backends import open_network
from utils.export.formats import FORMATS, ExportJob
from utils.export.metadata import ExportMetadata

CPU = torch.device("cpu")
SIDE = 64
TARGETS = ("onnx", "openvino", "tflite")


def needs(kind: str) -> None:
    try:
        int8_format(kind)
    except UserError as missing:
        pytest.skip(str(missing))


def calibration(folder: Path, side: int = SIDE) -> CalibrationImages:
    return CalibrationImages.of(picture_split(folder, [(side, side), (side, side * 3 // 4), (side * 3 // 4, side)] * 4), 12, side)


def files_of(kind: str, network: DetectionModel, images: CalibrationImages, folder: Path, side: int = SIDE, dynamic: bool = False) -> Int8Files:
    metadata = ExportMetadata.of(network, (side, side), dynamic=dynamic, precision="fp32", source="tiny.pt")
    return Int8Files(ExportJob(network, metadata), int8_format(kind), images, folder)


@pytest.fixture(scope="module", params=TARGETS)
def made(request, tmp_path_factory) -> tuple[Int8Files, DetectionModel, Tensor]:
    """The tiny network's float file and an int8 file of it, and images (N, 3, H, W) in 0..1."""
    needs(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    network = lively(tiny_model(folder, width=16))
    images = calibration(folder)
    files = files_of(request.param, network, images, folder)
    files.write(())
    return files, network, torch.from_numpy(images.first(12))


def sqnr_db(reference: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - found).square().sum()))


# --- the file ------------------------------------------------------------------------------------------------------------------------------


def test_an_int8_file_is_near_its_float_file(made):
    files, network, images = made
    exact, rounded = open_network(files.float_path), open_network(files.path_of[()])
    assert rounded.metadata == dataclasses.replace(exact.metadata, precision="int8")
    assert (rounded.names, rounded.max_stride, rounded.fixed) == (network.names, network.max_stride, (SIDE, SIDE))
    a, b = exact(images), rounded(images)
    with torch.no_grad():
        torch.testing.assert_close(a, network.decode(network(images)), rtol=1e-4, atol=1e-4)
    assert not torch.equal(a, b)
    # 7 bits hold 42 dB at best; where 16-bit sums saturate, it is 26 and 17
    assert sqnr_db(a[..., :4], b[..., :4]) > 34 and sqnr_db(a[..., 4:], b[..., 4:]) > 28


def test_decoding_is_untouched(made):
    """Boxes and probabilities of an int8 tensor would have 256 values at most."""
    files, _, _ = made
    boxes = open_network(files.path_of[()])(torch.rand(12, 3, SIDE, SIDE))
    assert all(len(boxes[..., column].unique()) > 300 for column in range(boxes.shape[-1]))
    assert float(boxes[..., :4].max()) > 60


def operators(path: Path) -> list[tuple[str, str, list[str]]]:
    """(name, type, names of those that it reads) of each node of a file, whatever its format."""
    if path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        graph = onnx.load(str(path)).graph
        makers = {output: node.name for node in graph.node for output in node.output}
        return [(node.name, node.op_type, [makers[i] for i in node.input if i in makers]) for node in graph.node]
    if path.suffix == ".tflite":
        graph, kinds = tflite_graph(path)
        makers = {output: str(n) for n, op in enumerate(graph.operators) for output in op.outputs}
        sources = [[makers[i] for i in op.inputs if i in makers] for op in graph.operators]
        return [(str(n), kind, read) for n, (kind, read) in enumerate(zip(kinds, sources, strict=True))]
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().read_model(next(path.glob("*.xml")))
    return [(op.get_friendly_name(), op.get_type_name(), [v.get_node().get_friendly_name() for v in op.input_values()])
            for op in model.get_ordered_ops()]


def tflite_graph(path: Path) -> tuple[Any, list[str]]:
    """Its one graph, and its operators' kinds."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    (graph,) = model.subgraphs
    return graph, [names[model.operatorCodes[op.opcodeIndex].builtinCode] for op in graph.operators]


ROUNDING = {"QuantizeLinear", "DequantizeLinear", "FakeQuantize", "QUANTIZE"}
WEIGHTED = ("Conv", "Convolution", "CONV_2D", "DEPTHWISE_CONV_2D")


def test_no_rounding_after_the_last_convolutions(made):
    files, _, _ = made
    nodes = operators(files.path_of[()])
    sources = {name: reads for name, _, reads in nodes}
    tail = find_tail(sources, [name for name, kind, _ in nodes if kind in WEIGHTED])
    kinds = {kind for name, kind, _ in nodes if name in tail.after}
    assert len(tail.last) == 3 and kinds & {"Sigmoid", "LOGISTIC"} and not kinds & (ROUNDING | {"DEQUANTIZE"})


def test_weights_are_int8_by_channel(made):
    files, network, _ = made
    path = files.path_of[()]
    if path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        constants = {c.name: onnx.numpy_helper.to_array(c) for c in onnx.load(str(path)).graph.initializer}
        weights = {name: value for name, value in constants.items() if value.ndim == 4 and name.endswith("_quantized")}
        assert len(weights) == len(files.layers) == 5
        for name, weight in weights.items():
            scale = constants[name.replace("_quantized", "_scale")]
            assert weight.dtype == np.int8 and len(scale) == len(weight) and abs(weight.astype(int)).max() == 64  # 7 bits: no 16-bit sum overflows
        assert {v.dtype for n, v in constants.items() if n.endswith("_zero_point") and v.ndim == 0} == {np.dtype(np.uint8)}
    elif path.suffix == ".tflite":
        check_tflite_weights(path, 5)
        assert len(files.layers) == 5
    else:
        openvino = pytest.importorskip("openvino")
        constants = [op for op in openvino.Core().read_model(next(path.glob("*.xml"))).get_ordered_ops() if op.get_type_name() == "Constant"]
        assert sum(op.get_element_type() == openvino.Type.i8 for op in constants) == len(files.layers) == 8
    assert set(files.layers) <= {name for name, _ in network.named_modules()}


def check_tflite_weights(path: Path, layers: int) -> None:
    """So many of the tiny network's 8 are int8."""
    graph, kinds = tflite_graph(path)
    convolutions = [[graph.tensors[i] for i in op.inputs] for op, kind in zip(graph.operators, kinds, strict=True) if kind in WEIGHTED]
    int8 = [(image, weight) for image, weight, _ in convolutions if weight.type == 9]  # INT8
    assert len(int8) == layers and len(convolutions) == 8 and {image.type for image, _ in int8} == {9}
    for _, weight in int8:
        assert len(weight.quantization.scale) == weight.shape[weight.quantization.quantizedDimension] > 1 and not any(weight.quantization.zeroPoint)
    assert [graph.tensors[i].type for i in (*graph.inputs, *graph.outputs)] == [0, 0]  # FLOAT32


def test_a_layer_that_stays_float(made):
    files, _, images = made
    kept = files.layers[0], files.layers[2]
    path = files.write(kept)
    kinds = [kind for _, kind, _ in operators(path)]
    assert open_network(path).metadata.float_layers == kept
    if path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        names = {c.name for c in onnx.load(str(path)).graph.initializer}
        assert {f"network.{layer}.weight" in names for layer in kept} == {True} and f"network.{files.layers[1]}.weight" not in names
    before = [kind for _, kind, _ in operators(files.path_of[()])]
    if path.suffix == ".tflite":  # it has a rounding more before each int8 part
        check_tflite_weights(path, 3)
    else:
        assert sum(kind in ROUNDING for kind in kinds) < sum(kind in ROUNDING for kind in before)
    exact, all_int8, some_float = (open_network(p)(images) for p in (files.float_path, files.path_of[()], path))
    assert sqnr_db(exact, some_float) > sqnr_db(exact, all_int8)


class Pictures(list):
    """In place of calibration images."""

    def shown(self, title: str) -> Iterator[np.ndarray]:
        return iter(self)


def test_a_tflite_file_where_its_converter_is_not(tiny, tmp_path: Path):
    """The quantizer runs beside the newest PyTorch; tiny.tflite is of two images of 64 x 96 px."""
    pytest.importorskip("ai_edge_quantizer")
    source = Path(__file__).with_name("tiny.tflite")
    pictures = torch.rand(4, 2, 3, 64, 96)
    quantizer = QUANTIZERS["tflite"][0](source, tiny, Pictures(pictures.numpy()), tmp_path)
    assert len(quantizer.layers) == 5 and set(quantizer.layers) <= {name for name, _ in tiny.named_modules()}
    exact = open_network(source)
    found = []
    for kept in ((), quantizer.layers[1:3]):
        path = tmp_path / f"{len(kept)}.tflite"
        quantizer.write(path, dataclasses.replace(exact.metadata, precision="int8", float_layers=kept))
        check_tflite_weights(path, 5 - len(kept))
        network = open_network(path)
        assert network.metadata.float_layers == kept
        found.append(network(pictures[0]))
    nearer = [sqnr_db(exact(pictures[0]), each) for each in found]
    assert 25 < nearer[0] < nearer[1]

    bright = QUANTIZERS["tflite"][0](source, tiny, Pictures(pictures.numpy() * 200), tmp_path)
    bright.write(tmp_path / "bright.tflite", exact.metadata)
    read_by_silu = [bright._extremes[name] for name in bright._silu]
    assert len(read_by_silu) == 5 and min(float(seen["min"].min()) for seen in read_by_silu) == SILU_FLOOR
    assert max(float(seen["max"].max()) for seen in read_by_silu) > 8


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_any_image_size(kind: str, tmp_path: Path):
    needs(kind)
    network, images = lively(tiny_model(tmp_path, width=16)), calibration(tmp_path)
    files = files_of(kind, network, images, tmp_path, dynamic=True)
    rounded = open_network(files.write(()))
    assert rounded.fixed is None
    pictures = torch.rand(2, 3, 96, 32).round(decimals=1)
    with torch.no_grad():
        assert sqnr_db(network.decode(network(pictures)), rounded(pictures)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("cfg", ["yolov5n.yaml", "yolov5s-ghost.yaml", "yolov5s-shuffle.yaml", "yolov5s-transformer.yaml"])
@pytest.mark.parametrize("kind", TARGETS)
def test_networks_that_ship(kind: str, cfg: str, tmp_path: Path):
    needs(kind)
    torch.manual_seed(0)
    network, images = lively(DetectionModel(load_spec(cfg, nc=3))), calibration(tmp_path, 128)
    files = files_of(kind, network, images, tmp_path, 128)
    modules = {name for name, _ in network.named_modules()}
    assert len(files.layers) > 20 and (cfg == "yolov5s-transformer.yaml" or set(files.layers) <= modules)
    pictures = torch.from_numpy(images.first(4))
    exact, rounded = open_network(files.float_path)(pictures), open_network(files.write(()))(pictures)
    assert sqnr_db(exact[..., :4], rounded[..., :4]) > 10


def test_a_file_in_its_place(made, tmp_path: Path):
    files, _, images = made
    path = tmp_path / "deep" / f"best_int8{files.kind.suffix}"
    for _ in range(2):  # the second takes the first one's place
        put(files.path_of[()], path, files.kind)
        assert torch.equal(open_network(path)(images), open_network(files.path_of[()])(images))
        assert [p.name for p in path.parent.iterdir()] == [path.name]


# --- the graph's end -----------------------------------------------------------------------------------------------------------------------


def test_what_silu_reads():
    sources = {"image": [], "a": ["image"], "s": ["a"], "p": ["a", "s"], "b": ["p"], "s2": ["b"], "p2": ["b", "s2"], "more": ["b"],
               "c": ["p2"], "s3": ["c"], "p3": ["c", "other"], "other": []}  # b has another reader, c's sigmoid another product
    assert silu_inputs(sources, {"s", "s2", "s3"}, {"p", "p2", "p3"}) == {"a"}


def test_steps_are_spent_where_silu_is_not_0(tmp_path: Path):
    """What the first layer's SiLU reads goes from far below -8 to far above; what the second's reads does not."""
    needs("onnx")
    onnx = pytest.importorskip("onnx")
    network, images = lively(tiny_model(tmp_path, width=16)), calibration(tmp_path)
    network.model[0].conv.weight.data *= 60
    network.model[1].conv.weight.data /= 60
    read = network.model[0].conv(torch.from_numpy(images.first(12)))
    assert float(read.min()) < -30 and float(read.max()) > 30
    graph = onnx.load(str(files_of("onnx", network, images, tmp_path).write(()))).graph
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    rounding = [node.input for node in graph.node if node.op_type == "QuantizeLinear"]
    lowest = {name: -float(constants[scale]) * float(constants[zero]) for name, scale, zero in rounding}
    first, second = (next(low for name, low in lowest.items() if f"model.{n}/conv/Conv_output" in name) for n in (0, 1))
    assert first == pytest.approx(SILU_FLOOR, abs=0.2) and SILU_FLOOR < second < 0


def test_what_belongs_to_a_layer():
    sources = {"image": [], "a": ["image"], "sigmoid": ["a"], "product": ["a", "sigmoid"], "b": ["product"], "sum": ["product", "b"], "half": []}
    functions = {"sigmoid", "product", "sum", "half"}
    assert with_activation("a", sources, functions) == {"a", "sigmoid", "product"} and with_activation("b", sources, functions) == {"b"}


def test_the_tail_by_hand():
    sources = {"image": [], "a": ["image"], "act": ["a"], "b": ["act"], "head1": ["b"], "head2": ["act"], "shape": ["head1"], "sigmoid": ["head1"],
               "all": ["sigmoid", "head2", "shape", "grid"], "grid": []}
    tail = find_tail(sources, ["a", "b", "head1", "head2"])
    assert tail.last == {"head1", "head2"} and tail.after == {"shape", "sigmoid", "all", "grid"}


# --- calibration ---------------------------------------------------------------------------------------------------------------------------


def test_images_are_those_that_validation_sees(tmp_path: Path):
    split = picture_split(tmp_path, [(80, 60), (60, 80), (64, 64)] * 4)
    seen = {index: image for batch in val_loader(split, SIDE, 5, None, 0, CPU) for index, image in zip(batch.indices, batch.images, strict=True)}
    order = np.random.default_rng(3).permutation(12)[:9]
    images = CalibrationImages.of(split, 9, SIDE, seed=3)
    for _ in range(2):
        drawn = list(images)
        assert len(drawn) == len(images) == 9
        for index, image in zip(order, drawn, strict=True):
            assert image.dtype == np.float32 and image.shape == (1, 3, SIDE, SIDE)
            assert np.array_equal(image[0], (seen[index].float() / 255).numpy())
    other = CalibrationImages.of(split, 9, SIDE, seed=4)
    assert not np.array_equal(images.first(9), other.first(9))
    assert images.first(2).shape == (2, 3, SIDE, SIDE) and len(images.first(99)) == 9


def test_fewer_images_than_asked_for(tmp_path: Path, capsys):
    split = picture_split(tmp_path, [(64, 64)] * 8)
    assert len(CalibrationImages.of(split, 300, SIDE)) == 8
    assert "has 8 images: calibrated on all of them" in capsys.readouterr().out
    (tmp_path / "few").mkdir()
    with pytest.raises(UserError, match=r"my\.yaml: its training split has 7 images, and int8 needs 8"):
        CalibrationImages.of(picture_split(tmp_path / "few", [(64, 64)] * 7), 300, SIDE, origin="my.yaml")


# --- how much may be lost ------------------------------------------------------------------------------------------------------------------


LAYERS = tuple("abcdefgh")


def play(scores: Sequence[float], max_drop: float, layers: Sequence[str] = LAYERS) -> list[tuple[tuple[str, ...], float]]:
    """What is tried where the n-th file scores so; the ranking is h, g, …, with a layer in it that can't be int8."""
    left = iter(scores)
    ranking = [*reversed(LAYERS[1:]), "detect", LAYERS[0]]
    return [(a.kept, round(a.drop, 6)) for a in attempts(lambda kept: Scores(0.9, next(left)), Scores(0.9, 0.5), max_drop, layers, lambda: ranking)]


def test_a_good_file_is_taken_at_once():
    assert play([0.495], 1.0) == [((), 0.5)]
    assert play([0.51], 0.0) == [((), -1.0)]
    untouched = attempts(lambda kept: Scores(0.9, 0.5), Scores(0.9, 0.5), 1.0, LAYERS, lambda: pytest.fail("no ranking is needed"))
    assert [attempt.kept for attempt in untouched] == [()]


def test_layers_stay_float_one_by_one():
    assert play([0.45, 0.48, 0.495], 1.0) == [((), 5.0), (("h",), 2.0), (("h", "g"), 0.5)]


def test_a_quarter_of_the_layers_at_most():
    assert [kept for kept, _ in play([0.4] * 9, 1.0)] == [(), ("h",), ("h", "g")]
    assert [kept for kept, _ in play([0.4] * 9, 1.0, "abc")] == [()]
    assert [kept for kept, _ in play([0.4] * 9, 1.0, ["detect", *"nopqrst"])] == [(), ("detect",)]  # the ranking knows no other of them


class Fake:
    """Files that only know which of their layers are float."""

    layers = LAYERS

    def __init__(self) -> None:
        self.written: list[tuple[str, ...]] = []

    def write(self, kept: tuple[str, ...]) -> tuple[str, ...]:
        self.written.append(kept)
        return kept


@pytest.mark.parametrize(("scores", "best"), [((0.4, 0.47, 0.45), 1), ((0.4, 0.47, 0.496), 2), ((0.4, 0.498, 0.5), 1)])
def test_the_best_attempt(scores, best, monkeypatch, capsys):
    monkeypatch.setattr("utils.compress.int8.open_network", lambda path: path)
    files = Fake()
    found = best_attempt(files, lambda network: Scores(0.9, scores[len(network)]), Scores(0.9, 0.5), 1.0, lambda: LAYERS)
    assert found.kept == LAYERS[:best]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(files.written) and "+10.00 points lost of 0.5000" in lines[0] and "with a in float too" in lines[1]


# --- bad input -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnx"), ("onnx", "onnxruntime"), ("openvino", "openvino"), ("openvino", "nncf"),
                                             ("tflite", "ai_edge_quantizer")])
def test_a_missing_package(kind: str, package: str, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest))
    with pytest.raises(UserError, match=rf"^{kind}: pip install .*\b{package}\b"):
        int8_format(kind)


def test_a_network_that_the_quantizer_refuses(made, monkeypatch):
    files, _, _ = made

    def fail(*_: object) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(files._quantizer, "write", fail)
    with pytest.raises(UserError, match=rf"^{files.kind.name}: this network can't be quantized: no such operator$"):
        files.write(("x",))


def test_which_formats_have_a_quantizer():
    assert FORMATS.keys() - QUANTIZERS.keys() == {"ncnn", "torchscript", "mnn", "coreml", "engine"} and QUANTIZERS.keys() <= FORMATS.keys()
    field = next(f for f in dataclasses.fields(QuantizeConfig) if f.name == "to")
    assert set(field.metadata["argparse"]["choices"]) == QUANTIZERS.keys()
