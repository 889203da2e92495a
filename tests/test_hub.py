"""torch.hub's entries as programs for YOLOv5 use them: values by hand, every attribute, and the caller's own packages left alone."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NAMES, lively_checkpoint, picture

import export
import hubconf
from models.detector import Detector
from models.hub_model import HubModel
from models.weights import open_weights
from models.yolo import DetectionModel
from utils.data.images import read_image
from utils.deploy.hub_results import HubResults
from utils.deploy.results import Result
from utils.draw import save_image
from utils.errors import UserError
from utils.evaluate.matching import Detections

ROOT = Path(hubconf.__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """tiny.pt, and two pictures."""
    place = tmp_path_factory.mktemp("hub")
    lively_checkpoint(place)
    for name, size in (("a.png", (64, 64)), ("b.png", (90, 40))):
        save_image(place / name, picture(np.random.default_rng(0), *size)[0])
    return place


@pytest.fixture
def model(place) -> HubModel:
    return hubconf.custom(place / "tiny.pt", device="cpu", _verbose=False)


def result_of(boxes: list[tuple[float, ...]], path: str = "", size: tuple[int, int] = (100, 80)) -> Result:
    """Boxes x1, y1, x2, y2, confidence, class; a blue image."""
    rows = np.array(boxes, float).reshape(-1, 6)
    image = np.full((size[1], size[0], 3), (200, 0, 0), np.uint8)
    return Result(image, Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(int)), NAMES, inference_ms=20, nms_ms=4, path=path)


BOXES = [(10, 20, 30, 40, 0.75, 1), (50, 0, 100, 80, 0.5, 1), (0, 0, 100, 80, 0.25, 0)]


@pytest.fixture
def results() -> HubResults:
    """Three boxes on in/a.png, none on an image without a file."""
    return HubResults([result_of(BOXES, "in/a.png"), result_of([])], NAMES, read_ms=6)


# --- results -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "boxes"), [
    ("xyxy", [(10, 20, 30, 40), (50, 0, 100, 80), (0, 0, 100, 80)]),
    ("xyxyn", [(0.1, 0.25, 0.3, 0.5), (0.5, 0, 1, 1), (0, 0, 1, 1)]),
    ("xywh", [(20, 30, 20, 20), (75, 40, 50, 80), (50, 40, 100, 80)]),
    ("xywhn", [(0.2, 0.375, 0.2, 0.25), (0.75, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]),
])  # fmt: skip
def test_four_forms_by_hand(form: str, boxes, results):
    first, second = getattr(results, form)
    assert first.dtype == torch.float32 and second.shape == (0, 6)
    torch.testing.assert_close(first, torch.tensor([(*box, *rest) for box, (*_, c, k) in zip(boxes, BOXES, strict=True) for rest in [(c, k)]]))


def test_tables(results):
    pytest.importorskip("pandas")
    tables = results.pandas()
    corners, centre = ["xmin", "ymin", "xmax", "ymax"], ["xcenter", "ycenter", "width", "height"]
    for form, columns in (("xyxy", corners), ("xyxyn", corners), ("xywh", centre), ("xywhn", centre)):
        first, second = getattr(tables, form)
        assert list(first.columns) == list(second.columns) == [*columns, "confidence", "class", "name"] and len(second) == 0
        np.testing.assert_allclose(first[columns], getattr(results, form)[0][:, :4], rtol=1e-6)
        assert first["class"].tolist() == [1, 1, 0] and first["name"].tolist() == ["green", "green", "red"]
    assert tables.xyxy[0]["class"].dtype == np.int64


def test_what_is_printed(results, capsys):
    results.print()
    assert capsys.readouterr().out == str(results) + "\n" == (
        "image 1/2: 80x100 2 greens, 1 red\n"
        "image 2/2: 80x100 (no detections)\n"
        "Speed: 3.0ms pre-process, 20.0ms inference, 4.0ms NMS per image\n")  # fmt: skip


def test_attributes(results):
    assert (results.n, len(results), results.t, results.names, results.files) == (2, 2, (3, 20, 4), {0: "red", 1: "green"}, ["a.png", "image1.jpg"])
    assert results.ims[0][0, 0].tolist() == [0, 0, 200] and results.pred is results.xyxy and results.imgs is results.ims
    one, two = results.tolist()
    assert (one.n, one.files, two.n) == (1, ["a.png"], 1) and torch.equal(one.xyxy[0], results.xyxy[0]) and len(two.xyxy[0]) == 0
    nothing = HubResults([], NAMES)
    assert (nothing.n, nothing.xyxy, nothing.ims, nothing.t, nothing.tolist()) == (0, [], [], (0, 0, 0), [])


def test_render_draws_on_ims(results):
    plain = results.ims[0].copy()
    drawn = results.render()
    assert drawn is results.ims and (drawn[0] != plain).any() and (drawn[1] == results.ims[1]).all()
    np.testing.assert_array_equal(drawn[0][..., ::-1], results.results[0].plot())
    assert (drawn[0] != results.render(labels=False)[0]).any()


def test_show_hands_each_image_to_the_viewer(results, monkeypatch):
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(np.asarray(image)))
    results.show()
    assert len(shown) == 2 and (shown[0] == results.render()[0]).all()


def test_save(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert results.save() == Path("runs/detect/exp") and results.save(labels=False) == Path("runs/detect/exp2")
    assert results.save(save_dir="mine/out") == results.save(save_dir="mine/out", exist_ok=True) == Path("mine/out")
    for folder in ("runs/detect/exp", "runs/detect/exp2", "mine/out"):
        assert sorted(p.name for p in Path(folder).iterdir()) == ["a.png", "image1.jpg"]
    np.testing.assert_array_equal(read_image("mine/out/a.png"), results.results[0].plot())


def test_images_of_one_name_are_both_saved(tmp_path):
    HubResults([result_of([], "in/a.png"), result_of([], "too/a.png")], NAMES).save(save_dir=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "a_2.png"]


def test_crop(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crops = results.crop(save=False)
    assert not list(tmp_path.iterdir()) and len(crops) == 3
    assert crops[0]["label"] == "green 0.75" and float(crops[0]["conf"]) == 0.75 and int(crops[0]["cls"]) == 1
    assert [float(v) for v in crops[0]["box"]] == [10, 20, 30, 40] and [c["im"].shape for c in crops] == [(20, 20, 3), (80, 50, 3), (80, 100, 3)]
    assert crops[0]["im"][0, 0].tolist() == [200, 0, 0]  # BGR, as cv2.imwrite takes it
    assert len(results.crop(save_dir="out")) == 3
    assert sorted(str(p.relative_to("out")) for p in Path("out").rglob("*.jpg")) == ["crops/green/a.jpg", "crops/green/a2.jpg", "crops/red/a.jpg"]


# --- model ---------------------------------------------------------------------------------------------------------------------------------


def test_a_model_finds_what_a_detector_finds(model, place):
    own = Detector(place / "tiny.pt", "cpu", "fp32")
    files = [str(place / "a.png"), place / "b.png"]
    found = model(files)
    assert found.files == ["a.png", "b.png"] and found.n == 2 and all(t >= 0 for t in found.t)
    for boxes, result in zip(found.xyxy, own(files), strict=True):
        np.testing.assert_array_equal(boxes, np.column_stack((result.xyxy, result.conf, result.cls)).astype(np.float32))
    assert sum(map(len, found.xyxy)) > 5
    assert (model.names, model.stride, model.device) == ({0: "red", 1: "green"}, 32, torch.device("cpu"))
    assert repr(model).startswith(f"HubModel({place / 'tiny.pt'}, 2 classes, ")


def test_names_may_be_changed(place):
    own = HubModel(open_weights(str(place / "tiny.pt"), "cpu", "fp32"))
    own.names[0] = "human"
    found = own(place / "a.png")
    assert found.names == {0: "human", 1: "green"} and set(found.pandas().xyxy[0].name) <= {"human", "green"}
    own.names = ["a", "b"]
    assert own(place / "a.png").names == {0: "a", 1: "b"}
    for names in (["a"], {0: "a"}, {"0": "a", "1": "b"}):
        own.names = names
        with pytest.raises(UserError, match="names: one is needed for each class number from 0 to 1, found"):
            own(place / "a.png")


def test_arrays_are_rgb(model, place):
    bgr = read_image(place / "a.png")
    (expected,) = model(place / "a.png").xyxy
    tensor = torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1])).permute(2, 0, 1)[None] / 255
    for image in (bgr[..., ::-1], [bgr[..., ::-1]], Image.open(place / "a.png"), tensor):
        assert torch.equal(model(image).xyxy[0], expected)
    assert not torch.equal(model(bgr).xyxy[0], expected)


def test_attributes_are_settings(model, place):
    own = Detector(place / "tiny.pt", "cpu", "fp32")

    def same_as(**settings: object) -> bool:
        found, expected = model(place / "b.png"), own(place / "b.png", **settings)[0]
        return len(found.xyxy[0]) == len(expected) > 0 and np.array_equal(found.xyxy[0][:, :4], expected.xyxy.astype(np.float32))

    assert (model.conf, model.iou, model.classes, model.max_det, model.agnostic, model.amp, model.multi_label) == (
        0.25, 0.45, None, 1000, False, False, False)  # fmt: skip
    model.conf = 0.5
    assert same_as(conf=0.5) and not same_as()
    model.iou = 0
    assert same_as(conf=0.5, iou=0) and not same_as(conf=0.5)
    model.agnostic = True
    assert same_as(conf=0.5, iou=0, agnostic=True) and not same_as(conf=0.5, iou=0)
    model.classes = 1
    assert same_as(conf=0.5, iou=0, classes=[1])
    model.max_det = 2
    assert same_as(conf=0.5, iou=0, classes=[1], max_det=2)
    model.classes, model.max_det, model.agnostic, model.iou, model.conf = None, 1000, False, 0.45, 0.01
    single = len(model(place / "b.png").xyxy[0])
    model.multi_label = True
    assert len(model(place / "b.png").xyxy[0]) > single


def test_size_and_augment(model, place):
    plain = model(place / "a.png").xyxy[0]
    assert torch.equal(model(place / "a.png", size=64).xyxy[0], plain)
    assert torch.equal(model(place / "a.png", 96).xyxy[0], model([place / "a.png"], size=(96, 96)).xyxy[0])
    assert not torch.equal(model(place / "a.png", 96).xyxy[0], plain) and not torch.equal(model(place / "a.png", augment=True).xyxy[0], plain)


def test_amp_computes_as_auto_does(model, place, monkeypatch):
    monkeypatch.setattr("utils.cpu.cpu_has_native_bf16", lambda: True)
    fp32 = model(place / "a.png").xyxy[0]
    model.amp = True
    mixed = model(place / "a.png").xyxy[0]
    np.testing.assert_array_equal(mixed[:, 4], Detector(place / "tiny.pt", "cpu", "auto")(place / "a.png")[0].conf.astype(np.float32))
    assert not torch.equal(mixed, fp32)


def test_moving(model, place):
    before = model(place / "a.png").xyxy[0]
    assert model.eval() is model.cpu() is model.to(torch.device("cpu")) is model
    assert torch.equal(model(place / "a.png").xyxy[0], before)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no CUDA device"):
            model.cuda()


@pytest.mark.parametrize(("setting", "line"), [
    ({"conf": 3}, "conf 3: must be between 0 and 1"),
    ({"classes": [0, 9]}, r"--classes 9: .*0 to 1 \(red to green\)"),
    ({"max_det": 0}, "max_det 0: must be above 0"),
])  # fmt: skip
def test_settings_out_of_range(setting, line, model, place):
    for name, value in setting.items():
        setattr(model, name, value)
    with pytest.raises(UserError, match=f"^{line}$"):
        model(place / "a.png")


def test_nothing_is_fetched(model):
    with pytest.raises(UserError, match=r"^https://host/zidane\.jpg: nothing is fetched from the network"):
        model("https://host/zidane.jpg")


# --- entries -------------------------------------------------------------------------------------------------------------------------------


def test_custom(place, capsys):
    hubconf.custom(str(place / "tiny.pt"), device="cpu")
    said = capsys.readouterr()
    assert said.err.startswith(f"{place / 'tiny.pt'}: 2 classes, on ") and not said.out
    network = hubconf.custom(place / "tiny.pt", autoshape=False, device="cpu")
    assert isinstance(network, DetectionModel) and [m.shape[-1] for m in network(torch.zeros(1, 3, 64, 64))] == [7, 7, 7]
    with pytest.raises(UserError, match=r"none\.pt: no such weights"):
        hubconf.custom("none.pt")


def test_named_networks(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^yolov5n: nothing is fetched .*yolov5n\.pt of 80 classes: .*pretrained=False for an untrained network$"):
        hubconf.yolov5n()
    with pytest.raises(UserError, match=r"^yolov5n: channels=4: images have 3 channels$"):
        hubconf.yolov5n(pretrained=False, channels=4)
    model = hubconf.yolov5n(pretrained=False, classes=3, device="cpu", _verbose=False)
    assert model.names == {0: "0", 1: "1", 2: "2"} and model(np.zeros((32, 32, 3), np.uint8), size=32).n == 1
    assert sum(p.numel() for p in hubconf.yolov5n(pretrained=False, autoshape=False, device="cpu").parameters()) == 1_872_157
    assert sum(p.numel() for p in hubconf.yolov5n6(pretrained=False, autoshape=False, device="cpu").parameters()) == 3_246_940
    (tmp_path / "yolov5n.pt").write_bytes((place / "tiny.pt").read_bytes())
    assert hubconf.yolov5n(device="cpu", _verbose=False).names == {0: "red", 1: "green"}
    assert {f"yolov5{size}{kind}" for size in "nsmlx" for kind in ("", "6")} <= set(dir(hubconf)) and "pretrained" in hubconf.yolov5x.__doc__


USERS_PROGRAM = """
import os, sys, torch
import utils.helper   # before ours
before = list(sys.path), os.getcwd(), dict(os.environ)
model = torch.hub.load({root!r}, "custom", path={weights!r}, source="local", device="cpu", _verbose=False, plugin="blocks.py")
detector = torch.hub.load({root!r}, "Detector", {weights!r}, source="local", precision="fp32")
assert sys.path == before[0] and os.getcwd() == before[1]
import models.net   # after ours
assert sys.modules["utils"] is utils and sys.modules["utils.helper"] is utils.helper
assert utils.WHO == utils.helper.WHO == models.net.WHO == "user"
assert not any((getattr(m, "__file__", None) or "").startswith({root!r}) for n, m in sys.modules.items() if n.startswith(("utils", "models")))
results = model([{image!r}])
assert results.n == 1 and len(results.xyxy[0]) == len(detector({image!r})[0]) > 0
results.print()
results.save(save_dir="out")
assert type(detector({image!r})[0]) is type(results.results[0])   # one copy of our modules serves every call
try:
    torch.hub.load({root!r}, "yolov5s", source="local")
except Exception as error:
    assert "nothing is fetched" in str(error)
else:
    raise AssertionError
"""


def test_a_program_with_its_own_models_and_utils(place, tmp_path):
    """Imported before ours, and after."""
    for name in ("utils/__init__.py", "utils/helper.py", "models/__init__.py", "models/net.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("WHO = 'user'\n")
    (tmp_path / "blocks.py").write_text("from models.registry import find_block\nassert find_block('Conv')\n")
    program = USERS_PROGRAM.format(root=str(ROOT), weights=str(place / "tiny.pt"), image=str(place / "a.png"))
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("image 1/1: 64x64 ") and [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


def test_what_lies_in_our_folder_is_not_ours_by_that(monkeypatch):
    """A virtual environment or the user's experiments may, with a utils of their own."""
    for file, ours in (("env/lib/utils.py", False), ("experiments/utils/__init__.py", False), ("utils/__init__.py", True), ("utils/boxes.py", True)):
        assert hubconf._is_ours("utils", SimpleNamespace(__file__=str(ROOT / file))) == ours


def test_a_program_in_this_folder_keeps_one_copy(place):
    """Here our packages are in use under their plain names already."""
    model = torch.hub.load(str(ROOT), "custom", path=str(place / "tiny.pt"), source="local", device="cpu", _verbose=False)
    assert isinstance(model, HubModel)


def test_exported_files(place, tmp_path):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    assert export.main(["--weights", str(place / "tiny.pt"), "--include", "onnx"]) == 0
    model = hubconf.custom(place / "tiny.onnx", _verbose=False)
    model.amp = True  # says nothing to a file
    found, expected = model(place / "a.png").xyxy[0], hubconf.custom(place / "tiny.pt", device="cpu", _verbose=False)(place / "a.png").xyxy[0]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(UserError, match="runs on the CPU"):
        model.cuda()
    with pytest.raises(UserError, match="takes images of 64x64 px only"):
        model(place / "a.png", size=96)
    assert open_weights(str(place / "tiny.onnx"), "", "fp32").moved("cpu").path.endswith("tiny.onnx")


def test_opening_lays_nothing_of_the_programs_aside(place, monkeypatch):
    """Its other threads may import meanwhile."""
    monkeypatch.setattr(hubconf, "_own_packages", lambda: pytest.fail("laid aside"))
    assert len(hubconf.Detector(place / "tiny.pt", "cpu")(place / "a.png", conf=0.01)[0])
