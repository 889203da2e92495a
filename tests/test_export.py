"""Networks out of PyTorch: the graph is the network's own decoding, the metadata comes back as it went, a false file is found out."""
from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import data_yaml, lively, tiny_model
from torch import Tensor, nn

from models.csp import TransformerBlock
from models.shuffle import ChannelShuffle
from models.spec import load_spec
from models.yolo import DetectionModel
from utils.data.scenes import render
from utils.errors import UserError
from utils.export import check
from utils.export import produce as production
from utils.export.backends import open_network
from utils.export.check import TOLERANCES, check_batches, check_images, compare
from utils.export.converters import FreeAttention, to_onnx, to_openvino
from utils.export.formats import FORMATS, ExportJob, choose_formats
from utils.export.graph import InferenceGraph, decode_maps
from utils.export.metadata import KEY, ExportMetadata, foreign_facts, metadata_from_props, openvino_props, stamp_onnx, stamp_openvino
from utils.export.produce import produce
from utils.extras import is_installed
from utils.signals import keep_signal_stack

CPU = torch.device("cpu")
FLEXIBLE = ("onnx", "openvino", "torchscript", *["mnn"] * is_installed("MNN"))  # take any image size; test_export_ncnn.py has another
META = ExportMetadata(("red", "a 'quoted' \"<é>\"\n & 名"), (8, 16, 32), 64, (64, 96), True, ((1.5, 2.25, 0.1, 1 / 3),) * 3, "fp16", "my best.pt")


def job_of(network: DetectionModel, imgsz: tuple[int, int] = (64, 64), dynamic: bool = False, precision: str = "fp32", batch: int = 1) -> ExportJob:
    return ExportJob(network, ExportMetadata.of(network, imgsz, dynamic=dynamic, precision=precision, source="tiny.pt"), batch, opset=17)


# --- the graph -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_the_graph_decodes_as_the_network_does(levels: int, tmp_path: Path):
    network = lively(tiny_model(tmp_path, levels=levels))
    images = torch.rand(2, 3, 128, 64)
    with torch.no_grad():
        expected, boxes = network.decode(network(images)), InferenceGraph(network)(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(boxes, expected, rtol=1e-6, atol=1e-6)


def test_decoding_by_hand():
    raw = torch.zeros(1, 1, 2, 3, 6)
    raw[0, 0, 1, 2] = torch.tensor((0.0, 0.0, 0.0, np.log(3), np.log(3), -np.log(3)))  # sigmoids .5 .5 .5 .75 .75 .25
    boxes = decode_maps([raw], torch.tensor([[[10.0, 20.0]]]), (8,))
    assert boxes.shape == (1, 6, 6)
    torch.testing.assert_close(boxes[0, 0], torch.tensor((4.0, 4.0, 10.0, 20.0, 0.5, 0.5)))
    torch.testing.assert_close(boxes[0, 5], torch.tensor((20.0, 12.0, 10.0, 45.0, 0.75, 0.25)))


def test_half_leaves_the_network_alone_and_its_boxes_float32(tiny):
    graph = InferenceGraph(tiny, half=True)
    boxes = graph(torch.rand(1, 3, 64, 64))
    assert boxes.dtype == torch.float32 and next(tiny.parameters()).dtype == torch.float32
    assert {p.dtype for p in graph.parameters()} == {torch.float16} and graph.anchors_px.dtype == torch.float32


def test_an_export_leaves_the_network_in_eval_mode(tmp_path: Path):
    """In training mode a row that draws at random, as Swin's do, would give other boxes at every call."""
    network = lively(tiny_model(tmp_path, dropout=0.5))
    images = torch.rand(1, 3, 64, 64)
    expected = network.decode(network(images))
    for kind, format in ((name, FORMATS[name]) for name in FLEXIBLE):
        (tmp_path / kind).mkdir()
        format.write(job_of(network), tmp_path / kind / "" if format.is_folder else tmp_path / kind / f"a{format.suffix}")
        assert not any(module.training for module in network.modules())
        assert torch.equal(network.decode(network(images)), expected)


@pytest.fixture(scope="module", params=["tiny", "yolov5s-ghost.yaml", "yolov5s-shuffle.yaml"])
def network(request, tiny) -> DetectionModel:
    torch.manual_seed(0)
    return tiny if request.param == "tiny" else lively(DetectionModel(load_spec(request.param, nc=3)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", FLEXIBLE)
def test_files_find_what_the_network_finds(kind: str, dynamic: bool, network: DetectionModel, tmp_path: Path):
    format = FORMATS[kind]
    path = tmp_path / f"a{format.suffix}"
    if format.is_folder:
        path.mkdir()
    format.write(job_of(network, (64, 96), dynamic, batch=2), path)
    exported = open_network(path)
    assert exported.names == network.names and exported.max_stride == network.max_stride and exported.imgsz == (64, 96)
    assert (exported.fixed, exported.pad_stride) == ((None, 32) if dynamic else ((64, 96), None))
    for size in ((2, 3, 64, 96), *(((1, 3, 128, 64), (3, 3, 96, 96)) if dynamic else ())):
        images = torch.rand(size)
        with torch.no_grad():
            expected = network.decode(network(images))
        assert expected[..., 4].std() > 0.05
        torch.testing.assert_close(exported.decode(exported(images)), expected, rtol=1e-4, atol=1e-4)


def test_names_of_yolov5s_files(tiny, tmp_path: Path):
    onnx, images = pytest.importorskip("onnx"), torch.zeros(1, 3, 64, 64)
    to_onnx(InferenceGraph(tiny), images, tmp_path / "a.onnx", opset=17)
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert [v.name for v in (*graph.input, *graph.output)] == ["images", "output0"]
    model = to_openvino(InferenceGraph(tiny), images)
    assert [port.any_name for port in (*model.inputs, *model.outputs)] == ["images", "output0"]


def test_attention_for_any_number_of_places(tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), TransformerBlock(16, 4, 2)).eval()
    to_onnx(network, torch.zeros(1, 3, 16, 16), tmp_path / "a.onnx", dynamic=True, opset=17)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for size in ((1, 3, 16, 16), (2, 3, 32, 16), (3, 3, 16, 48)):
        images = torch.rand(size)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"need_weights": True}, {"key_padding_mask": torch.tensor([[False] * 5 + [True] * 2] * 3)}, {"value": 2.0}])
def test_attention_that_asks_for_more_is_left_alone(extra):
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.rand(3, 7, 8)
    others = {"value": x * 2} if "value" in extra else extra
    call = {"query": x, "key": x, "value": x, "need_weights": False} | others
    expected = attention(**call)
    with FreeAttention():
        found = attention(**call)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert (found[1] is None) == (expected[1] is None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_newer_exporter_where_the_older_fails(dynamic: bool, tiny, tmp_path: Path, monkeypatch):
    pytest.importorskip("onnxscript", reason="PyTorch's newer ONNX exporter: pip install onnxscript")
    export = torch.onnx.export

    def newer_only(*args, dynamo: bool, **options):
        if not dynamo:
            raise RuntimeError("is gone")
        return export(*args, dynamo=True, **options)

    monkeypatch.setattr(torch.onnx, "export", newer_only)
    FORMATS["onnx"].write(job_of(tiny, (64, 96), dynamic, batch=2), tmp_path / "a.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    exported = open_network(tmp_path / "a.onnx")
    assert exported.fixed == (None if dynamic else (64, 96))
    for size in ((2, 3, 64, 96), *(((1, 3, 96, 32),) if dynamic else ())):
        images = torch.rand(size)
        torch.testing.assert_close(exported(images), tiny.decode(tiny(images)), rtol=1e-4, atol=1e-4)


def test_a_pruned_shuffle_in_openvino(tmp_path: Path):
    """OpenVINO 2026.4 folds a gather of channels into the convolution behind it as if every order were its own inverse."""
    openvino = pytest.importorskip("openvino")

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.shuffle, self.after = nn.Conv2d(3, 5, 1), ChannelShuffle(), nn.Conv2d(8, 6, 1)
            self.shuffle.narrow([3, 1, 4, 0, 5, 7, 2, 6])

        def forward(self, images: Tensor) -> Tensor:
            return self.after(self.shuffle(images, self.before(images)))

    network, images = Shuffled().requires_grad_(False), torch.rand(2, 3, 6, 8)
    to_onnx(network, images, tmp_path / "a.onnx", dynamic=True)
    for model in (to_openvino(network, images), openvino.Core().read_model(tmp_path / "a.onnx")):
        with keep_signal_stack():
            compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        torch.testing.assert_close(torch.from_numpy(compiled(images.numpy())[0]), network(images), rtol=1e-5, atol=1e-5)


# --- metadata ------------------------------------------------------------------------------------------------------------------------------


def test_metadata_comes_back_as_it_went(tiny, tmp_path: Path):
    onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    assert metadata_from_props(META.to_props(), "a") == META
    path, images = tmp_path / "a.onnx", torch.zeros(1, 3, 64, 64)
    to_onnx(InferenceGraph(tiny), images, path)
    for metadata in (dataclasses.replace(META, precision="int8"), META):  # the second takes the first's place
        stamp_onnx(path, metadata)
    assert metadata_from_props({entry.key: entry.value for entry in onnx.load(path).metadata_props}, "a") == META
    assert open_network(path).metadata == META

    model = to_openvino(InferenceGraph(tiny), images)
    stamp_openvino(model, META)
    openvino.save_model(model, tmp_path / "a.xml")
    assert metadata_from_props(openvino_props(openvino.Core().read_model(tmp_path / "a.xml")), "a") == META


def test_other_programs_read_names_and_stride():
    props = META.to_props()
    assert foreign_facts(props) == (META.names, 64)
    own = json.loads(props[KEY])
    del own["max_stride"]  # as files were before they told it
    assert metadata_from_props({KEY: json.dumps(own)}, "old.onnx").max_stride == 32
    assert foreign_facts({"names": "['a', 'b']", "stride": "64"}) == (("a", "b"), 64)


@pytest.mark.parametrize("props", [
    {}, {"names": "", "stride": ""}, {"names": "__import__('os').getcwd()", "stride": "(1"}, {"names": "{0: 'a', 2: 'b'}", "stride": "-1"},
    {"names": "[1, 2]", "stride": "[8, 16]"}, {"stride": "2048"}, {"names": "(" * 9999, "stride": "True"},
])  # fmt: skip
def test_facts_that_are_none(props):
    assert foreign_facts(props) == ((), None)


def altered(**fields: object) -> str:
    content = json.loads(META.to_props()[KEY]) | fields
    return json.dumps({key: value for key, value in content.items() if value != "gone"})


@pytest.mark.parametrize(("text", "words"), [
    ("", "can't be read"), ("[1]", "can't be read"), ("{}", "can't be read"), (META.to_props()[KEY][:-9], "can't be read"),
    ("[" * 99999, "can't be read"), (altered(format="other"), "can't be read"), (altered(version="1"), "can't be read"),
    (altered(version=2), "newer.*up to 1: update"),
    (altered(names=[]), "names"), (altered(names=[1]), "names"), (altered(strides=[8, -1], imgsz=[64]), "strides and imgsz"),
    (altered(strides=[8, 2048]), "strides"), (altered(imgsz=[64, 9e9]), "imgsz"), (altered(imgsz=[64, 16416]), "imgsz"),
    (altered(dynamic=1), "dynamic"), (altered(anchors=[[1, "2"]]), "anchors"),
    (altered(float_layers=None), "float_layers"), (altered(anchors=[[1, float("nan")]]), "anchors"), (altered(anchors=[[10**400, 1]]), "anchors"),
    (altered(names=["red", "\ud800"]), "names"),
    (altered(precision="fp8"), "precision"), (altered(source="gone"), "source"),
])  # fmt: skip
def test_damaged_metadata(text: str, words: str):
    with pytest.raises(UserError, match=f"^a.onnx: .*{words}"):
        metadata_from_props({KEY: text}, "a.onnx")


def test_metadata_of_the_first_files():
    """Before int8 there were no layers to name."""
    assert metadata_from_props({KEY: altered(float_layers="gone")}, "a") == META


def test_no_metadata_is_no_error():
    assert metadata_from_props({"names": "['a']"}, "a") is None


# --- the check -----------------------------------------------------------------------------------------------------------------------------


class Altered:
    """A network whose boxes are changed before they are given."""

    def __init__(self, network: DetectionModel, change) -> None:
        self.network, self.change = network, change

    def __call__(self, images: Tensor) -> Tensor:
        return self.change(self.network.decode(self.network(images)).clone())

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs


def times(column: int | slice, factor: float):
    def change(boxes: Tensor) -> Tensor:
        boxes[..., column] *= factor
        return boxes

    return change


@pytest.mark.parametrize(("change", "fp32", "fp16"), [
    (lambda boxes: boxes, True, True), (times(4, 1.005), True, True), (times(2, 1.005), True, True), (times(2, 1.03), False, True),
    (times(4, 0.95), False, False), (times(slice(2, 4), 1.05), False, False), (times(0, 1.2), False, False), (times(4, 0), False, False),
    (times(4, float("nan")), False, False), (lambda boxes: boxes.flip(1), False, False),
    (lambda boxes: boxes[..., [0, 1, 2, 3, 4, 6, 5]], False, False),
])  # fmt: skip
def test_what_the_check_lets_pass(change, fp32: bool, fp16: bool, tiny):
    batches = check_batches(check_images()[:3], (64, 64), None)
    for precision, holds in (("fp32", fp32), ("fp16", fp16)):
        agreement = compare(tiny, Altered(tiny, change), batches, TOLERANCES[precision], CPU)
        assert agreement.holds == holds and agreement.boxes > 5 and agreement.images == 3, str(agreement)


def test_boxes_that_only_the_file_finds(tiny):
    """One of them, which is less than the share of rows that may stray."""
    batches = check_batches(check_images()[:3], (64, 64), None)
    boxes = tiny.decode(tiny(batches[0].float() / 255))
    image, row = divmod(int((boxes[..., 4] * boxes[..., 5:].amax(-1)).argmax()), boxes.shape[1])

    def hide(found: Tensor) -> Tensor:
        found[image, row, 4] = 0
        return found

    for pair in ((Altered(tiny, hide), tiny), (tiny, Altered(tiny, hide))):
        agreement = compare(*pair, batches, TOLERANCES["fp32"], CPU)
        assert agreement.unmatched == 1 and 0 < agreement.strayed < 0.002 and not agreement.holds


def test_differences_by_hand(tiny):
    def change(boxes: Tensor) -> Tensor:
        boxes[0, 0, 1] += 3
        boxes[0, 1, 6] += 0.5
        return boxes

    batches = check_batches(check_images()[:2], (64, 64), None)
    agreement = compare(tiny, Altered(tiny, change), batches, TOLERANCES["fp32"], CPU)
    rows = 2 * sum(3 * (64 // s) ** 2 for s in tiny.strides)
    assert agreement.box_px == pytest.approx((3, 3 / (rows * 4)), rel=1e-3) and agreement.score == pytest.approx((0.5, 0.5 / (rows * 3)), rel=1e-3)


def test_a_network_that_is_sure_of_nothing_is_compared_too(tiny):
    unsure = Altered(tiny, times(4, 0.001))
    batches = check_batches(check_images()[:2], (64, 64), None)
    same = compare(unsure, unsure, batches, TOLERANCES["fp32"], CPU)
    assert same.holds and same.boxes > 5 and same.threshold < 0.001
    assert not compare(unsure, Altered(tiny, times(4, 0.0009)), batches, TOLERANCES["fp32"], CPU).holds


def test_images_of_the_check(tmp_path: Path):
    generated = check_images()
    assert len(generated) == 8 and len({image.shape for image in generated}) > 5
    assert [tuple(b.shape) for b in check_batches(generated[:5], (96, 64), None)] == [(4, 3, 96, 64), (1, 3, 96, 64)]
    free = check_batches(generated, (256, 256), 32)
    assert len(free) == 2 + 8 and len({b.shape for b in free[2:]}) > 1
    own = check_images(str(data_yaml(tmp_path, val=3)))
    assert len(own) == 3 and {max(image.shape) for image in own} == {64}


def test_images_of_the_check_without_the_photograph(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    assert [image.shape for image in check_images()] == [render(seed).image.shape for seed in range(8)]


def test_damaged_images_are_left_out_of_the_check(tmp_path: Path, capsys):
    """Their ends are whole, which is what the scan of a data set looks at."""
    data = data_yaml(tmp_path, val=3)
    paths = sorted((tmp_path / "images" / "val").iterdir())

    def damage(path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[:99] + bytes(len(whole) - 198) + whole[-99:])

    damage(paths[1])
    assert len(check_images(str(data))) == 2
    assert f"{paths[1]}: " in (said := capsys.readouterr().err) and "left out of the check" in said
    for path in paths[::2]:
        damage(path)
    with pytest.raises(UserError, match=r"tiny_data\.yaml: none of 3 images of its val split can be read"):
        check_images(str(data))


# --- from the network to its place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLEXIBLE)
def test_a_false_file_is_kept_aside_and_the_old_one_stays(kind: str, tiny, tmp_path: Path, capfd):
    format, images = FORMATS[kind], check_images()[:2]
    path = produce(job_of(tiny), format, tmp_path / "best", images, tiny, CPU)
    assert "have their partner" in capfd.readouterr().out
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*"))
    for _ in range(2):  # the one aside before makes room
        with pytest.raises(UserError, match=rf"^{kind}: does not find what the checkpoint finds: .*kept aside as .*best\.mismatch"):
            produce(job_of(tiny), format, tmp_path / "best", images, Altered(tiny, times(0, 2.0)), CPU)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((f"best{format.suffix}", f"best.mismatch{format.suffix}"))
    assert set(before) <= {p.stat().st_mtime_ns for p in tmp_path.rglob("*")} | {tmp_path.stat().st_mtime_ns}
    assert open_network(path).names == open_network(tmp_path / f"best.mismatch{format.suffix}").names == tiny.names


class Rigid(DetectionModel):
    """Knows one image size, as networks do that compute with Python's own numbers."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward(images.reshape(-1, 3, int(images.shape[2]), int(images.shape[3])))


@pytest.mark.parametrize("kind", FLEXIBLE)
def test_a_network_that_cannot_be_dynamic(kind: str, tiny, tmp_path: Path):
    rigid = lively(Rigid(tiny.spec, tiny.names))
    with pytest.raises(UserError, match=rf"^{kind}: .*without --dynamic it may go$") as caught:
        produce(job_of(rigid, (256, 256), dynamic=True), FORMATS[kind], tmp_path / "rigid", check_images()[:3], rigid, CPU)
    aside = tmp_path / f"rigid.mismatch{FORMATS[kind].suffix}"
    assert str(caught.value).count(str(tmp_path)) == 1 and f"kept aside as {aside}" in str(caught.value) and list(tmp_path.iterdir()) == [aside]
    assert produce(job_of(rigid, (256, 256)), FORMATS[kind], tmp_path / "rigid", check_images()[:1], rigid, CPU).exists()


def test_a_network_that_no_converter_knows(tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("utils.export.converters.is_installed", lambda package: False)  # the newer exporter takes seconds

    class Exotic(DetectionModel):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [torch.special.bessel_j0(raw) for raw in super().forward(images)]

    exotic = Exotic(tiny.spec, tiny.names).eval()
    for kind in (FORMATS["onnx"], FORMATS["openvino"]):
        with pytest.raises(UserError, match=f"^{kind.name}: this network can't be converted: .*bessel_j0"):
            produce(job_of(exotic), kind, tmp_path / "exotic", check_images()[:1], exotic, CPU)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed(tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("utils.extras.is_installed", lambda package: package == "onnx")
    with pytest.raises(UserError, match=r"^onnx: pip install onnxruntime$"):
        produce(job_of(tiny), FORMATS["onnx"], tmp_path / "a", [], tiny, CPU)


def test_a_full_disk_is_the_users_line(tiny, tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(production, "open_network", full)
    with pytest.raises(OSError, match="No space"):
        produce(job_of(tiny), FORMATS["onnx"], tmp_path / "a", [], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


def test_only_the_converter_is_blamed(tiny, tmp_path: Path, monkeypatch):
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(production, "compare", bug)
    with pytest.raises(ZeroDivisionError):
        produce(job_of(tiny), FORMATS["onnx"], tmp_path / "a", check_images()[:1], tiny, CPU)
    monkeypatch.setattr("utils.export.formats.to_onnx", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        produce(job_of(tiny), FORMATS["onnx"], tmp_path / "a", [], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


def test_formats_by_name():
    assert choose_formats(["openvino", "onnx", "openvino"]) == [FORMATS["openvino"], FORMATS["onnx"]]
    assert choose_formats(["ONNX,OpenVINO"]) == [FORMATS["onnx"], FORMATS["openvino"]]
    assert all("export onnx" in format.missing() for format in choose_formats(["pb", "edgetpu", "paddle", "tfjs", "saved_model"]))
    with pytest.raises(UserError, match=r"--include onx: no such format; did you mean onnx.*there are onnx, openvino, ncnn, torchscript"):
        choose_formats(["onnx", "onx"])
    for nothing in ("", ","):
        with pytest.raises(UserError, match="--include : no such format; there are"):
            choose_formats([nothing])


def test_a_shuffle_brings_no_transposition_of_the_layout(tmp_path: Path):
    """Though PyTorch computes channels last: these runtimes lay tensors out themselves."""
    onnx = pytest.importorskip("onnx")
    network = InferenceGraph(DetectionModel(load_spec("yolov5s-shuffle.yaml")).fused())
    kinds = []
    for layout in (torch.contiguous_format, torch.channels_last):
        to_onnx(network.to(memory_format=layout), torch.rand(1, 3, 64, 64), tmp_path / "a.onnx")
        kinds.append([node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node])
    assert kinds[0] == kinds[1]
    assert next(p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1).is_contiguous(memory_format=torch.channels_last)  # as it was


def test_files_are_compared_in_full_float32(tmp_path: Path, tiny: DetectionModel, monkeypatch: pytest.MonkeyPatch):
    """TensorFloat-32, a GPU's own choice, is further from a file than the tolerance allows."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[bool] = []
    reference = copy.deepcopy(tiny)
    reference.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    produce(job_of(tiny), FORMATS["onnx"], tmp_path / "a", [np.zeros((64, 64, 3), np.uint8)], reference, CPU)
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


class Dead(nn.Module):
    """A network one of whose levels says nothing."""

    def __init__(self, network: DetectionModel, level: int) -> None:
        super().__init__()
        self.network, self.level = network, level
        self.names, self.strides, self.anchors_px = network.names, network.strides, network.anchors_px
        self.max_stride = network.max_stride

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.network(images)
        return [raw * 0 if n == self.level else raw for n, raw in enumerate(maps)]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_that_is_dead_is_seen_though_no_box_is_sure_there(tmp_path: Path, tiny: DetectionModel, level: int):
    pytest.importorskip("onnxruntime")
    quiet = copy.deepcopy(tiny)
    for n, conv in enumerate(quiet.head.m):
        if n == level:
            conv.bias.view(quiet.head.num_anchors, -1)[:, 4] -= 12  # no objects at this level
    job = dataclasses.replace(job_of(quiet), network=Dead(quiet, level))
    with pytest.raises(UserError, match=r"of all rows are further apart than they may be|have no partner"):
        produce(job, FORMATS["onnx"], tmp_path / "a", [np.zeros((64, 64, 3), np.uint8)], quiet, CPU)
    produce(job_of(quiet), FORMATS["onnx"], tmp_path / "b", [np.zeros((64, 64, 3), np.uint8)], quiet, CPU)


@pytest.mark.parametrize(("moved", "less_sure", "strays"), [(0.3, 0.0, False), (0.6, 0.0, True), (0.0, 0.008, False), (0.0, 0.02, True)])
def test_which_rows_stray(moved: float, less_sure: float, strays: bool):
    """Of a box of 2 px a third is little; of a score a hundredth is the most."""
    ours = torch.tensor([[[20.0, 20.0, 2.0, 2.0, 0.5, 0.9]]])
    others = ours + torch.tensor([moved, 0, 0, 0, less_sure, 0])
    assert check._stray(ours, others, TOLERANCES["fp32"]).tolist() == [strays]
