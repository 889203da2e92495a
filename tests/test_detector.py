"""The Python door: every kind of image means the same, the boxes are detect.py's, threads share a detector, mistakes are one line."""
from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NAMES, lively_checkpoint, picture

import detect
import export
from models.detector import Detector
from models.yolo import DetectionModel
from utils.data.images import read_image
from utils.deploy.inputs import open_pictures
from utils.deploy.results import Result
from utils.deploy.writer import save_crops
from utils.errors import UserError
from utils.evaluate.matching import Detections
from utils.evaluate.output import yolo_lines

SIZES = [(64, 64), (90, 40), (40, 90), (33, 31)]
KINDS = {"pt": "tiny.pt", "onnx": "tiny.onnx", "openvino": "tiny_openvino_model"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """tiny.pt, and pictures of four sizes in images/."""
    place = tmp_path_factory.mktemp("detector")
    (place / "images").mkdir()
    lively_checkpoint(place)
    rng = np.random.default_rng(0)
    for n, (width, height) in enumerate(SIZES):
        cv2.imwrite(str(place / "images" / f"{n}.png"), picture(rng, width, height)[0])
    return place


@pytest.fixture(scope="module")
def detector(place) -> Detector:
    return Detector(place / "tiny.pt", "cpu", "fp32")


@pytest.fixture(scope="module")
def files(place) -> list[Path]:
    return sorted((place / "images").iterdir())


def weights_of(kind: str, place: Path) -> Path:
    """The checkpoint, or what export.py made of it."""
    path = place / KINDS[kind]
    if not path.exists():
        for package in ("onnx", "onnxruntime", "openvino"):
            pytest.importorskip(package)
        assert export.main(["--weights", str(place / "tiny.pt"), "--include", kind, "--dynamic"]) == 0
    return path


def assert_same(a: Result, b: Result) -> None:
    for name in ("xyxy", "conf", "cls", "image"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def tensor_of(bgr: np.ndarray) -> torch.Tensor:
    """(3, H, W) uint8 RGB."""
    return torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1])).permute(2, 0, 1)


# --- images --------------------------------------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "text": lambda path, bgr: str(path),
    "path": lambda path, bgr: path,
    "Pillow, from a file": lambda path, bgr: Image.open(path),
    "Pillow": lambda path, bgr: Image.fromarray(np.ascontiguousarray(bgr[..., ::-1])),
    "Pillow, opaque": lambda path, bgr: Image.fromarray(np.ascontiguousarray(bgr[..., ::-1])).convert("RGBA"),
    "array": lambda path, bgr: bgr,
    "array with steps": lambda path, bgr: np.ascontiguousarray(bgr[::-1, :, ::-1])[::-1, :, ::-1],
    "opaque array": lambda path, bgr: np.dstack((bgr, np.full(bgr.shape[:2], 255, np.uint8))),
    "batch of one": lambda path, bgr: bgr[None],
    "tensor": lambda path, bgr: tensor_of(bgr),
    "float tensor": lambda path, bgr: tensor_of(bgr) / 255,
    "tensor with gradients": lambda path, bgr: (tensor_of(bgr) / 255).requires_grad_(),
    "tensor batch": lambda path, bgr: tensor_of(bgr)[None],
    "list": lambda path, bgr: [bgr],
    "generator": lambda path, bgr: (image for image in (bgr,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_is_the_same_image(form: str, detector, files):
    own = read_image(files[1])
    (expected,) = detector(files[1], conf=0.1)
    assert len(expected) > 5
    given = FORMS[form](files[1], own)
    (found,) = detector(given, conf=0.1)
    assert_same(found, expected)
    np.testing.assert_array_equal(found.image, own)
    assert found.path == (str(files[1]) if form in ("text", "path", "Pillow, from a file") else "")


def test_lists_of_mixed_kinds_and_sizes(detector, files):
    images = [read_image(path) for path in files]
    mixed = [files[0], Image.open(files[1]), images[2], tensor_of(images[3]), torch.stack([tensor_of(images[0])] * 2)]
    found = detector(mixed, conf=0.1)
    assert [r.size for r in found] == [*SIZES, SIZES[0], SIZES[0]]
    for result, path in zip(found, [*files, files[0], files[0]], strict=True):
        assert_same(result, detector(path, conf=0.1)[0])
    assert [len(r.path) > 0 for r in found] == [True, True, False, False, False, False]


def test_the_padding_of_a_screens_pixels_is_no_transparency(detector, files):
    image = read_image(files[0])
    padded = np.dstack((image, np.zeros(image.shape[:2], np.uint8)))
    assert_same(detector(padded)[0], detector(image)[0])
    padded[0, 0, 3] = 255
    assert (detector(padded)[0].image[1:] == 255).all()


@pytest.mark.parametrize("nothing", [[], (), torch.zeros(0, 3, 32, 32), np.zeros((0, 32, 32, 3), np.uint8), iter(())])
def test_no_images_no_results(detector, nothing):
    assert detector(nothing) == []


def pixels(image: Any) -> np.ndarray:
    ((_, found),) = open_pictures(image)
    return found


def test_grey_becomes_colour(tmp_path):
    grey = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    tensor = torch.from_numpy(grey)[None]
    for form in (tmp_path / "grey.png", grey, grey[..., None], Image.fromarray(grey), tensor, tensor / 255):
        np.testing.assert_array_equal(pixels(form), np.repeat(grey[..., None], 3, 2))
    deep = Image.fromarray(grey.astype(np.uint16) << 8)
    assert deep.mode.startswith("I") and (pixels(deep) == grey[..., None]).all()


def test_transparency_lies_on_white(tmp_path):
    bgra = np.zeros((4, 5, 4), np.uint8)
    bgra[...] = 10, 100, 200, 255
    bgra[0, 0] = 10, 100, 200, 0
    bgra[1, 1] = 10, 100, 200, 51  # a fifth
    cv2.imwrite(str(tmp_path / "clear.png"), bgra)
    rgba = np.ascontiguousarray(bgra[..., [2, 1, 0, 3]])
    for form in (tmp_path / "clear.png", bgra, Image.fromarray(rgba), torch.from_numpy(rgba).permute(2, 0, 1)):
        found = pixels(form)
        assert found[0, 0].tolist() == [255, 255, 255] and found[3, 3].tolist() == [10, 100, 200]
        assert found[1, 1].tolist() == [255 - 49, 255 - 31, 255 - 11]
    ((_, found),) = open_pictures(rgba, rgb=True)
    np.testing.assert_array_equal(found, pixels(bgra))


def test_an_orientation_is_applied_in_every_form(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8), (20, 1))).convert("RGB").save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert pixels(tmp_path / "turned.jpg").shape == (50, 20, 3)
    np.testing.assert_allclose(pixels(Image.open(tmp_path / "turned.jpg")), pixels(tmp_path / "turned.jpg").astype(int), atol=3)


def test_arrays_as_rgb(files):
    image = read_image(files[0])
    ((_, found),) = open_pictures(np.ascontiguousarray(image[..., ::-1]), rgb=True)
    np.testing.assert_array_equal(found, image)
    ((_, tensor),) = open_pictures(tensor_of(image), rgb=True)  # tensors are RGB anyway
    np.testing.assert_array_equal(tensor, image)


# --- boxes ---------------------------------------------------------------------------------------------------------------------------------


def lines_of(results: list[Result]) -> dict[str, str]:
    return {Path(r.path).stem: yolo_lines(r.found, np.array(r.size), True) for r in results if len(r)}


def detect_py(weights: Path, place: Path, out: Path, *flags: str) -> dict[str, str]:
    """What detect.py writes of each image."""
    before = set(out.iterdir())
    assert detect.main(["--weights", str(weights), "--source", str(place / "images"), "--device", "cpu", "--precision", "fp32", "--save-txt",
                        "--save-conf", "--nosave", "--project", str(out), *flags]) == 0
    (run,) = set(out.iterdir()) - before
    return {path.stem: path.read_text() for path in (run / "labels").iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_those_of_detect_py(kind: str, place, files, tmp_path):
    """Digit for digit, with the same settings."""
    path = weights_of(kind, place)
    own = Detector(path, "cpu", "fp32")
    for flags, settings in (
        ([], {}),
        (["--conf", "0.1", "--iou", "0.2", "--max-det", "7"], {"conf": 0.1, "iou": 0.2, "max_det": 7}),
        (["--conf", "0.05", "--classes", "1", "--imgsz", "96", "128"], {"conf": 0.05, "classes": [1], "imgsz": (96, 128)}),
        (["--conf", "0.05", "--iou", "0", "--agnostic-nms"], {"conf": 0.05, "iou": 0, "agnostic": True}),
    ):
        expected = detect_py(path, place, tmp_path, *flags)
        assert len(expected) == 4 and sum(text.count("\n") for text in expected.values()) > 8
        assert lines_of(own(files, **settings)) == expected
    assert lines_of(own(files, conf=0.05, iou=0)) != expected  # with suppression within classes


def test_augment_is_that_of_detect_py(place, files, tmp_path):
    augmented = Detector(place / "tiny.pt", "cpu", "fp32", augment=True)(files)
    assert lines_of(augmented) == detect_py(place / "tiny.pt", place, tmp_path, "--augment")
    assert lines_of(augmented) != detect_py(place / "tiny.pt", place, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_detector(kind: str, place, files):
    """Each gets its own images' boxes under its own settings."""
    shared = Detector(weights_of(kind, place), "cpu", "fp32", callers=4)
    jobs = [(files[n % 4], {"conf": (0.05, 0.3)[n % 2], "classes": (None, 0, [1])[n % 3], "imgsz": (64, 96)[n // 2 % 2]}) for n in range(24)]
    expected = [shared(image, **settings)[0] for image, settings in jobs]
    assert len({len(r) for r in expected}) > 5
    with ThreadPoolExecutor(6) as pool:
        for found, own in zip(pool.map(lambda job: shared(job[0], **job[1])[0], jobs), expected, strict=True):
            assert_same(found, own)


def test_a_call_leaves_no_trace(place, files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def state() -> list[Any]:
        return [os.getcwd(), dict(os.environ), list(sys.path), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_rng_state().tolist(), list(tmp_path.iterdir())]

    fused = DetectionModel.fused
    monkeypatch.setattr(DetectionModel, "fused", lambda self: (torch.rand(3), fused(self))[1])  # some of timm's draw where they merge
    before = state()
    own = Detector(place / "tiny.pt", "cpu")
    given = read_image(files[0])
    kept = given.copy()
    first = own(given, conf=0.1, classes=0)
    second = own(given, conf=0.1, classes=0)
    assert state() == before
    np.testing.assert_array_equal(given, kept)
    assert_same(first[0], second[0])
    assert set(first[0].cls) == {0} and set(own(given, conf=0.1)[0].cls) == {0, 1}  # no setting stays


# --- mistakes ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "line"), [
    ("none.png", "none.png: No such file or directory"),
    (["0.png", Path("none.png")], "image 1 of the list: none.png: No such file or directory"),
    (".", r".: a folder: name the images in it, as sorted\(Path\('.'\).glob\('\*.jpg'\)\) does"),
    ("broken.jpg", r"broken.jpg: truncated: .*"),
    ("video.mp4", "video.mp4: not an image of a known format"),
    ("https://host/a.jpg", "https://host/a.jpg: nothing is fetched from the network: download it and name the file"),
    (None, r"NoneType is no image: give a path, a Pillow image \(of an open file, Image.open makes one\), an array or a tensor"),
    (io.BytesIO(b"one\ntwo"), "BytesIO is no image: .*"),
    (7, "int is no image: .*"),
    (b"0.png", "bytes is no image: .*"),
    ([["0.png"]], "image 0 of the list: list is no image: .*"),
    (np.zeros((8, 8, 3)), r"array of shape \(8, 8, 3\), float64: arrays are uint8, 0 to 255"),
    (np.zeros((8, 8, 2), np.uint8), r"array of shape \(8, 8, 2\), uint8: arrays are \(H, W\), \(H, W, 3\) or \(H, W, 4\), or a batch of them"),
    (np.zeros(8, np.uint8), r"array of shape \(8,\), uint8: arrays are .*"),
    (np.zeros((0, 8, 3), np.uint8), r"array of shape \(0, 8, 3\), uint8: has no pixels"),
    (torch.zeros(8, 8, 3), r"tensor of shape \(8, 8, 3\), float32: tensors are \(3, H, W\), or a batch \(B, 3, H, W\), RGB"),
    (torch.full((3, 8, 8), 200.0), r"tensor of shape \(3, 8, 8\), float32: its values go from 200 to 200, where floats are 0 to 1: .*"),
    (torch.full((3, 8, 8), torch.nan), r"tensor of shape \(3, 8, 8\), float32: its values go from nan to nan, .*"),
    (torch.zeros(3, 8, 8, dtype=torch.int64), r"tensor of shape \(3, 8, 8\), int64: tensors are uint8, or float in 0..1"),
    (torch.zeros(3, 0, 8), r"tensor of shape \(0, 8, 3\), uint8: has no pixels"),
])  # fmt: skip
def test_no_image(images, line, detector, place, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").write_bytes(files[0].read_bytes())
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "video.mp4").write_bytes(b"\0" * 5000)
    with pytest.raises(UserError, match=f"^{line}$"):
        detector(images)


def test_a_broken_pillow_image(detector, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"^image 0 of the list: .*trunc"):
        detector([Image.open(tmp_path / "cut.png")])


@pytest.mark.parametrize(("settings", "line"), [
    ({"conf": 2}, "conf 2: must be between 0 and 1"),
    ({"conf": "high"}, "conf 'high': expected a number"),
    ({"iou": float("nan")}, "iou nan: must be a finite number"),
    ({"max_det": 0}, "max_det 0: must be above 0"),
    ({"conf": torch.tensor(0.5)}, r"conf tensor\(0.5000\): expected a number"),
    ({"conf": None}, "conf None: expected a number"), ({"iou": None}, "iou None: expected a number"),
    ({"max_det": 2.5}, "max_det 2.5: expected a whole number"),
    ({"classes": [2]}, r"--classes 2: this network knows classes 0 to 1 \(red to green\)"),
    ({"classes": -1}, "classes -1: must be 0 or more"),
    ({"classes": "red"}, "classes 'red': give class numbers, such as .*"),
    ({"classes": []}, r"classes \[\]: give at least one class number, or None for all"),
    ({"imgsz": 16}, "imgsz 16: takes one or two sizes between 32 and 8192 pixels"),
    ({"imgsz": (64, 64, 64)}, "imgsz 64 64 64: takes one or two sizes .*"),
    ({"imgsz": 64.5}, "imgsz 64.5: one size, or height and width, in whole pixels"),
])  # fmt: skip
def test_settings_out_of_range(settings, line, detector, files):
    with pytest.raises(UserError, match=f"^{line}$"):
        detector(files[0], **settings)


def test_settings_of_other_number_types(detector, files):
    (plain,) = detector(files[0], conf=0.125, classes=[0, 1], imgsz=96, max_det=5)
    (other,) = detector(files[0], np.float32(0.125), classes=torch.tensor([0, 1]), imgsz=np.int64(96), max_det=np.int32(5))
    assert_same(plain, other)
    assert len(plain) == 5


def test_devices_and_precisions(place):
    assert Detector(place / "tiny.pt", torch.device("cpu")).weights.device == torch.device("cpu")
    with pytest.raises(UserError, match=r"--device 0: best\.onnx runs on the CPU"):
        Detector("best.onnx", 0)
    with pytest.raises(UserError, match=r"best\.onnx: no such"):
        Detector("best.onnx", torch.device("cpu"))
    with pytest.raises(UserError, match="precision 'half': one of auto, fp32, bf16, fp16"):
        Detector(place / "tiny.pt", precision="half")


def test_weights_that_are_none(tmp_path):
    (tmp_path / "half.pt").write_bytes(b"PK\3\4" + b"\0" * 100)
    for name, words in (("none.pt", "no such weights"), ("half.pt", r"half\.pt"), ("none_openvino_model", "no such exported network")):
        with pytest.raises(UserError, match=words):
            Detector(tmp_path / name)


# --- results -------------------------------------------------------------------------------------------------------------------------------


def by_hand(boxes: list[tuple[float, ...]] = [(10, 20, 30, 40, 0.5, 1), (0, 0, 100, 80, 0.25, 0)]) -> Result:  # noqa: B006
    """Boxes x1, y1, x2, y2, confidence, class on an image of 100 x 80 pixels."""
    rows = np.array(boxes, float).reshape(-1, 6)
    return Result(np.full((80, 100, 3), 50, np.uint8), Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(int)), NAMES, path="in/a.jpg")


def test_a_result_in_words():
    result = by_hand()
    assert len(result) == 2 and result.size == (100, 80) and result.labels == ["green", "red"]
    assert result.to_dict() == {"path": "in/a.jpg", "width": 100, "height": 80, "boxes": [
        {"class": 1, "name": "green", "confidence": 0.5, "xyxy": [10.0, 20.0, 30.0, 40.0]},
        {"class": 0, "name": "red", "confidence": 0.25, "xyxy": [0.0, 0.0, 100.0, 80.0]},
    ]}  # fmt: skip
    assert json.loads(result.to_json()) == result.to_dict() and "\n" not in result.to_json()
    assert by_hand([]).to_dict()["boxes"] == [] and len(by_hand([])) == 0


def test_a_result_as_pictures(tmp_path):
    result = by_hand()
    assert [crop.shape for crop in result.crop()] == [(20, 20, 3), (80, 100, 3)]
    plain = result.plot(line_width=1, labels=False)
    assert (plain[30, 10] != 50).any() and (plain[30, 20] == 50).all() and (result.image == 50).all()
    assert (result.plot() != result.plot(conf=False)).any()
    path = result.save(tmp_path / "new" / "a.png", line_width=1, labels=False)
    np.testing.assert_array_equal(read_image(path), plain)
    nothing = by_hand([])
    assert (nothing.plot() == nothing.image).all() and nothing.plot() is not nothing.image and nothing.crop() == []
    with pytest.raises(UserError, match=r"a\.xyz: can't write images of this kind"):
        result.save(tmp_path / "a.xyz")


def test_a_result_as_a_table():
    pytest.importorskip("pandas")
    table = by_hand().pandas()
    assert list(table.columns) == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    assert table.to_dict("records") == [
        {"xmin": 10, "ymin": 20, "xmax": 30, "ymax": 40, "confidence": 0.5, "class": 1, "name": "green"},
        {"xmin": 0, "ymin": 0, "xmax": 100, "ymax": 80, "confidence": 0.25, "class": 0, "name": "red"},
    ]
    nothing = by_hand([]).pandas()
    assert list(nothing.columns) == list(table.columns) and len(nothing) == 0 and list(nothing.dtypes) == list(table.dtypes)
    assert not nothing["name"].str.contains("red").any()


def test_a_result_for_supervision():
    pytest.importorskip("supervision")
    found = by_hand().supervision()
    np.testing.assert_array_equal(found.xyxy, [[10, 20, 30, 40], [0, 0, 100, 80]])
    assert found.confidence.tolist() == [0.5, 0.25] and found.class_id.tolist() == [1, 0] and found["class_name"].tolist() == ["green", "red"]
    assert len(by_hand([]).supervision()) == 0 and len(found[found["class_name"] == "red"]) == 1


@pytest.mark.parametrize("callers", [0, -1, 1.5, "2", None])
def test_callers_are_counted(callers: object, place: Path):
    with pytest.raises(UserError, match=r"^callers .*: expected a whole number of 1 or more$"):
        Detector(place / "tiny.pt", callers=callers)


def test_limits_of_a_file_are_told_once(place: Path, tmp_path: Path, capfd):
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    shutil.copy(place / "tiny.pt", tmp_path)
    assert export.main(["--weights", str(tmp_path / "tiny.pt"), "--include", "onnx", "--nms", "--imgsz", "64"]) == 0
    detector, image = Detector(tmp_path / "tiny.onnx"), np.zeros((50, 60, 3), np.uint8)
    for _ in range(3):  # as a video's frames
        detector(image, conf=0.1)
    assert capfd.readouterr().err.count("suppresses boxes itself, with --conf-thres 0.25") == 1


def test_threads_that_open_files_leave_stderr_where_it_was(capfd):
    pytest.importorskip("ai_edge_litert")
    file = Path(__file__).with_name("tiny.tflite")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: Detector(file), range(40)))
    os.write(2, b"still here")
    assert "still here" in capfd.readouterr().err


@pytest.mark.parametrize("package", ["pandas", "supervision"])
def test_a_package_that_is_missing(package: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^needs {package}: pip install {package}$"):
        getattr(by_hand(), package)()


def test_a_result_on_one_line():
    assert repr(by_hand()) == "<Result in/a.jpg: 100x80, 1 green, 1 red>"
    assert repr(by_hand([])).endswith("(no detections)>")


def test_threads_that_crop_into_one_folder(tmp_path: Path):
    """They have the same names, as images without a file do."""
    result = by_hand()
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(save_crops, tmp_path, "image0", result) for _ in range(40)]:
            done.result()
    assert len(list(tmp_path.rglob("*.jpg"))) == 40 * len(result)


def test_a_mistake_arrives_from_another_process(monkeypatch):
    error = UserError("nope.jpg: No such file")
    assert type(pickle.loads(pickle.dumps(error))) is UserError
    monkeypatch.delitem(sys.modules, "utils.errors")  # as torch.hub leaves it
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is RuntimeError and str(arrived) == str(error)


def test_line_width_between_pixels():
    assert (by_hand().plot(line_width=1.6) == by_hand().plot(line_width=2)).all()
