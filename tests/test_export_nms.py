"""Suppression inside exported graphs: what utils/nms.py keeps, in both runtimes; and its proof finds every kind of fault."""
from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.yolo import DetectionModel
from utils.errors import UserError
from utils.export import produce as production
from utils.export.backends import open_network, spread
from utils.export.check import TOLERANCES, check_batches, check_images
from utils.export.check_final import compare_final
from utils.export.formats import FORMATS, ExportJob
from utils.export.metadata import KEY, ExportMetadata, GraphNms, metadata_from_props
from utils.export.produce import produce
from utils.export.suppression import _program
from utils.nms import NmsOptions, non_max_suppression
from utils.signals import keep_signal_stack

onnx, onnxruntime, openvino = (pytest.importorskip(package) for package in ("onnx", "onnxruntime", "openvino"))
CPU = torch.device("cpu")
NMS = GraphNms(0.25, 0.45, 20)


def job_of(network: DetectionModel, nms: GraphNms | None = NMS, dynamic: bool = False, opset: int = 17, source: str = "tiny.pt") -> ExportJob:
    return ExportJob(network, ExportMetadata.of(network, (64, 64), dynamic=dynamic, precision="fp32", source=source, nms=nms), opset=opset)


def options(nms: GraphNms) -> NmsOptions:
    return NmsOptions(nms.conf_thres, nms.iou_thres, max_det=nms.max_det)


def suppressed(boxes: Tensor, options: NmsOptions) -> list[Tensor]:
    """Decoded boxes (B, N, 5 + C), image by image."""
    return [torch.from_numpy(non_max_suppression(image.numpy(), options)) for image in boxes]


# --- the program ---------------------------------------------------------------------------------------------------------------------------


def in_onnxruntime(program: onnx.ModelProto, boxes: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"output0": boxes})[0]


def in_openvino(program: onnx.ModelProto, boxes: np.ndarray) -> np.ndarray:
    with keep_signal_stack():
        model = openvino.compile_model(openvino.convert_model(io.BytesIO(program.SerializeToString())), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model(boxes)[0]


@pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])
@pytest.mark.parametrize(("classes", "places", "nms"), [
    (1, 50, NMS), (3, 900, NMS), (3, 900, GraphNms(0.001, 0.6, 300)), (80, 400, GraphNms(0.25, 0.45, 1000)), (2, 8, GraphNms(0.999, 0.5, 3)),
    (2, 100, GraphNms(0.0, 1.0, 30)), (2, 100, GraphNms(0.3, 0.0, 5)),
])  # fmt: skip
def test_the_program_keeps_what_suppression_keeps(runtime, classes: int, places: int, nms: GraphNms):
    """Crowded boxes of three images, of which one has none above the threshold; more rows than boxes, and fewer."""
    generator = torch.Generator().manual_seed(places)
    boxes = torch.rand(3, places, 5 + classes, generator=generator)
    boxes[..., :2] *= 200
    boxes[..., 2:4] *= 80
    boxes[1, :, 4] *= 0.2 if nms.conf_thres else 1
    found = runtime(_program(classes, nms, 17), boxes.numpy())
    assert found.shape == (3, nms.max_det, 6)
    for image, expected in zip(found, suppressed(boxes, options(nms)), strict=True):
        np.testing.assert_allclose(image[: len(expected)], expected.numpy(), rtol=1e-6)
        assert not image[len(expected) :].any()


def test_spread_by_hand():
    rows = spread(np.array([[[10, 20, 30, 60, 0.5, 2], [0, 0, 0, 0, 0, 0]]], np.float32), 3)
    np.testing.assert_array_equal(rows, [[[20, 40, 20, 40, 0.5, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 0]]])
    kept = suppressed(torch.from_numpy(rows), NmsOptions())
    torch.testing.assert_close(kept[0], torch.tensor([[10, 20, 30, 60, 0.5, 2]]))


# --- files ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_files_keep_what_suppression_keeps(kind: str, dynamic: bool, tiny, tmp_path: Path, capfd):
    path = produce(job_of(tiny, dynamic=dynamic), FORMATS[kind], tmp_path / "tiny", check_images()[:2], tiny, CPU)
    assert "final boxes of" in capfd.readouterr().out
    network = open_network(path)
    assert network.nms == network.metadata.nms == NMS and network.names == tiny.names
    for size in ((2, 3, 64, 64), *(((1, 3, 96, 64), (3, 3, 32, 32)) if dynamic else ())):
        images = torch.rand(size)
        kept, expected = (suppressed(boxes, options(NMS)) for boxes in (network(images), tiny.decode(tiny(images))))
        assert sum(map(len, expected)) > 2
        for ours, theirs in zip(kept, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_what_readers_find(tiny, tmp_path: Path):
    FORMATS["onnx"].write(job_of(tiny), tmp_path / "a.onnx")
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert [(value.name, [side.dim_value for side in value.type.tensor_type.shape.dim]) for value in graph.output] == [("detections", [1, 20, 6])]
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_network_sure_of_nothing_is_proved_below_the_threshold(kind: str, tiny, tmp_path: Path, capfd):
    path = produce(job_of(tiny, GraphNms(0.999, 0.45, 50)), FORMATS[kind], tmp_path / "tiny", check_images()[:2], tiny, CPU)
    assert "neither has a box above 0.999; with a lower threshold final boxes" in capfd.readouterr().out
    assert open_network(path).nms.conf_thres == 0.999 and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_fails_below_the_threshold(tiny, tmp_path: Path, monkeypatch):
    """What is said names no file that is gone."""
    check = production._check

    def fail(job, path, *rest):
        if job.metadata.nms.conf_thres < 0.9:
            raise UserError(f"{path}: fails on images")
        return check(job, path, *rest)

    monkeypatch.setattr(production, "_check", fail)
    with pytest.raises(UserError, match=r"^onnx: fails on images; kept aside as .*tiny\.mismatch\.onnx$"):
        produce(job_of(tiny, GraphNms(0.999, 0.45, 50)), FORMATS["onnx"], tmp_path / "tiny", check_images()[:2], tiny, CPU)


def test_formats_that_have_no_suppression(tiny, tmp_path: Path):
    with pytest.raises(UserError, match=r"^torchscript: --nms goes into onnx and openvino only"):
        produce(job_of(tiny), FORMATS["torchscript"], tmp_path / "a", [], tiny, CPU)
    with pytest.raises(UserError, match="--opset 12: --nms takes 13 or more"):
        produce(job_of(tiny, opset=12), FORMATS["onnx"], tmp_path / "a", [], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


def test_metadata_comes_back(tiny):
    for nms in (None, NMS):
        metadata = job_of(tiny, nms).metadata
        assert metadata_from_props(metadata.to_props(), "a") == metadata
    old = metadata.to_props()[KEY].replace(', "nms": {"conf_thres": 0.25, "iou_thres": 0.45, "max_det": 20}', "")
    assert "nms" not in old and metadata_from_props({KEY: old}, "a") == dataclasses.replace(metadata, nms=None)
    for wrong in ('"max_det": 0', '"max_det": 1.5', '"most": 20'):
        with pytest.raises(UserError, match="its metadata's nms can't be understood"):
            metadata_from_props({KEY: metadata.to_props()[KEY].replace('"max_det": 20', wrong)}, "a")


@pytest.mark.parametrize(("asked", "short"), [
    ((0.25, 0.45, 20, False), False), ((0.5, 0.45, 5, False), False), ((0.2, 0.45, 20, False), True), ((0.25, 0.5, 20, False), True),
    ((0.25, 0.45, 21, False), True), ((0.25, 0.3, 20, False), True), ((0.25, 0.45, 20, True), True),
])  # fmt: skip
def test_what_the_file_can_not_give(asked: tuple[float, float, int, bool], short: bool):
    conf_thres, iou_thres, max_det, agnostic = asked
    assert bool(NMS.falls_short(NmsOptions(conf_thres, iou_thres, max_det=max_det, agnostic=agnostic))) == short


def test_stricter_overlap_is_not_more_suppression():
    """The second box, which suppresses the third, would have been suppressed by the first."""
    boxes = np.array([[x, 50, 100, 100, confidence, 1] for x, confidence in ((50, 0.95), (90, 0.9), (120, 0.85))], np.float32)
    loosely = non_max_suppression(boxes, NmsOptions(iou_thres=0.45))
    kept = boxes[np.isin(boxes[:, 4], loosely[:, 4])]
    once, twice = (non_max_suppression(rows, NmsOptions(iou_thres=0.3)) for rows in (boxes, kept))
    assert (len(once), len(loosely), len(twice)) == (2, 2, 1)


# --- the proof -----------------------------------------------------------------------------------------------------------------------------


class Suppressed:
    """The network with suppression done outside, its final boxes changed before they are given."""

    def __init__(self, network: DetectionModel, change, nms: GraphNms = NMS) -> None:
        self.network, self.change, self.nms = network, change, nms

    def __call__(self, images: Tensor) -> Tensor:
        rows = np.zeros((len(images), 200, 6), np.float32)
        for n, boxes in enumerate(suppressed(self.network.decode(self.network(images)), options(self.nms))):
            boxes = self.change(boxes.clone())
            rows[n, : len(boxes)] = boxes.numpy()
        return torch.from_numpy(spread(rows, len(self.network.names)))

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs


def moved(column: int, by: float):
    def change(boxes: Tensor) -> Tensor:
        boxes[:, column] += by
        return boxes

    return change


@pytest.mark.parametrize(("change", "holds"), [
    (lambda boxes: boxes, True), (moved(0, 0.01), True), (moved(4, 0.004), True), (moved(0, 5), False), (moved(4, -0.05), False),
    (lambda boxes: boxes[1:], False), (lambda boxes: boxes[:-1], False), (lambda boxes: boxes[:0], False),
    (lambda boxes: torch.cat((boxes, boxes[:1])), False), (lambda boxes: torch.cat((boxes[:, :5], 1 - boxes[:, 5:]), 1), False),
])  # fmt: skip
def test_what_the_proof_lets_pass(change, holds: bool, tiny):
    nms = GraphNms(0.3, 0.45, 200)
    agreement = compare_final(tiny, Suppressed(tiny, change, nms), nms, check_batches(check_images()[:3], (64, 64), None), TOLERANCES["fp32"], CPU)
    assert agreement.holds == holds and agreement.images == 3, str(agreement)


def test_a_graph_that_suppresses_too_little_or_too_much(tiny):
    batches = check_batches(check_images()[:3], (64, 64), None)
    for iou, holds in ((0.45, True), (0.9, False), (0.1, False)):
        exported = Suppressed(tiny, lambda boxes: boxes, GraphNms(0.3, iou, 200))
        assert compare_final(tiny, exported, GraphNms(0.3, 0.45, 200), batches, TOLERANCES["fp32"], CPU).holds == holds
