"""detect.py and its parts: reference boxes, every saving flag on real images, videos in and out, and the user's mistakes."""
from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import detect as script
from models.yolo import load_model
from utils.boxes import cxcywh_to_xyxy
from utils.data.augment import letterbox
from utils.data.images import read_image
from utils.data.sources import Frame, Source, VideoInfo
from utils.deploy.pipeline import detect
from utils.deploy.predictor import Predictor
from utils.deploy.results import Result, Style, Tally
from utils.deploy.writer import Outputs, ResultWriter, file_name
from utils.errors import UserError
from utils.evaluate.matching import Detections
from utils.network import TorchRunner
from utils.nms import NmsOptions

CPU = torch.device("cpu")
# class, cx, cy, w, h (normalised), confidence: FACTS.md, section 5
REFERENCE = {
    "bus.jpg": [(0, 0.0401, 0.6704, 0.0802, 0.2815, 0.423), (5, 0.5265, 0.4731, 0.9123, 0.5741, 0.648), (0, 0.9210, 0.5847, 0.1531, 0.4546, 0.712),
                (0, 0.3463, 0.5894, 0.1617, 0.4435, 0.767), (0, 0.1691, 0.6009, 0.2123, 0.4704, 0.838)],
    "zidane.jpg": [(0, 0.0699, 0.5167, 0.1398, 0.9111, 0.274), (27, 0.3680, 0.8035, 0.0500, 0.3931, 0.315),
                   (0, 0.3586, 0.6292, 0.4688, 0.7250, 0.713), (0, 0.7297, 0.5201, 0.3281, 0.9181, 0.754)],
}


class FixedNetwork:
    """Finds the same boxes on every image: rows of cx, cy, w, h in network pixels, objectness, one probability a class."""

    def __init__(self, rows: Sequence[Sequence[float]] = (), wait_s: Sequence[float] = (0.0,)) -> None:
        self.rows = torch.tensor(rows, dtype=torch.float32).view(1, len(rows), 7)
        self.wait_s = wait_s
        self.calls = 0
        self.shapes: list[tuple[int, ...]] = []
        self.inside, self.most_inside = 0, 0  # callers at one time
        self.lock = threading.Lock()

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        with self.lock:
            self.calls += 1
            self.shapes.append(tuple(images.shape))
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            wait_s = self.wait_s[self.calls % len(self.wait_s)]
        time.sleep(wait_s)
        with self.lock:
            self.inside -= 1
        return [self.rows]

    def decode(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        return outputs[0]


ONE_BOX = [(320, 192, 64, 32, 0.9, 1.0, 0.0)]


def fixed(rows: Sequence[Sequence[float]] = ONE_BOX, wait_s: Sequence[float] = (0.0,), **options: object) -> Predictor:
    return Predictor(TorchRunner(FixedNetwork(rows, wait_s), CPU), ("cat", "dog"), 32, (640, 640), NmsOptions(**options))


def result_of(rows: Sequence[Sequence[float]], size: tuple[int, int] = (100, 80), names: Sequence[str] = ("cat", "dog")) -> Result:
    """Rows of x1, y1, x2, y2, confidence, class."""
    array = np.array(rows, float).reshape(-1, 6)
    image = np.full((size[1], size[0], 3), 50, np.uint8)
    return Result(image, Detections(array[:, :4], array[:, 4], array[:, 5].astype(int)), names)


def frames_of(path: str, count: int, size: tuple[int, int] = (64, 48), fps: float = 12.5) -> Iterator[Frame]:
    """A video whose frame k is of brightness k + 1."""
    for k in range(count):
        yield Frame(path, k, np.full((size[1], size[0], 3), k + 1, np.uint8), VideoInfo(fps, count, *size))


def source_of(frames: Iterator[Frame], live: bool = False) -> Source:
    return Source(lambda *_: frames, live)


def writer_of(folder: Path, **outputs: object) -> ResultWriter:
    def make() -> Path:
        folder.mkdir()
        return folder

    return ResultWriter(make, Outputs(**outputs))


def video_facts(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Frames that can be decoded, frames a second, (width, height)."""
    capture = cv2.VideoCapture(str(path))
    fps, size = capture.get(cv2.CAP_PROP_FPS), (int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)))
    count = 0
    while capture.read()[0]:
        count += 1
    capture.release()
    return count, fps, size


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    height, width = frames[0].shape[:2]
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    for frame in frames:
        out.write(frame)
    out.release()


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("frame source", "result writer", "video writer", "inference"))]


def names_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- letterbox and predictor ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "imgsz", "shape", "gain", "offset"),
    [
        ((1920, 1080), (640, 640), (384, 640), 1 / 3, (0, 12)),
        ((1080, 1920), (640, 640), (640, 384), 1 / 3, (12, 0)),
        ((640, 480), (640, 640), (480, 640), 1.0, (0, 0)),
        ((100, 50), (640, 640), (320, 640), 6.4, (0, 0)),
        ((1920, 1080), (192, 640), (192, 352), 192 / 1080, (5, 0)),  # the height limits: 341 of 352 columns
        ((4000, 10), (64, 64), (32, 64), 0.016, (0, 16)),
    ],
)
def test_letterbox_by_hand(size, imgsz, shape, gain, offset):
    padded, geometry = letterbox(np.zeros((size[1], size[0], 3), np.uint8), imgsz, 32)
    assert padded.shape == (*shape, 3)
    assert geometry.gain_x == pytest.approx(gain, rel=1e-3)
    assert (geometry.left, geometry.top) == pytest.approx(offset, abs=1)


@pytest.mark.parametrize(("size", "imgsz", "gain", "offset"), [
    ((1920, 1080), (640, 640), 1 / 3, (0, 140)), ((100, 50), (96, 64), 0.64, (0, 32)), ((50, 100), (64, 96), 0.64, (32, 0)),
])  # fmt: skip
def test_letterbox_to_the_whole_size(size, imgsz, gain, offset):
    padded, geometry = letterbox(np.full((size[1], size[0], 3), 7, np.uint8), imgsz, None)
    assert padded.shape == (*imgsz, 3) and (geometry.left, geometry.top) == offset
    assert geometry.gain_x == geometry.gain_y == pytest.approx(gain) and (padded == 7).all(2).sum() == round(size[0] * gain) * round(size[1] * gain)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 400), st.integers(1, 400)), st.tuples(st.integers(1, 8), st.integers(1, 8)), st.sampled_from((8, 32)))
def test_letterbox_fits_and_comes_back(size, strides, stride):
    imgsz = strides[0] * 32, strides[1] * 32
    padded, geometry = letterbox(np.zeros((size[1], size[0], 3), np.uint8), imgsz, stride)
    height, width = padded.shape[:2]
    assert height % stride == width % stride == 0 and height <= imgsz[0] and width <= imgsz[1]
    boxes = np.array([[0.0, 0.0, size[0], size[1]], [size[0] / 3, size[1] / 7, size[0] / 2, size[1] / 2]])
    np.testing.assert_allclose(geometry.back(geometry.forward(boxes)), boxes, atol=1e-9)


@pytest.fixture(scope="module")
def reference_predictor(shared) -> Predictor:
    model = load_model(str(shared / "weights" / "yolov5n.pt"))
    runner = TorchRunner(model.fused().to(memory_format=torch.channels_last), CPU)
    return Predictor(runner, model.names, 32, (640, 640), NmsOptions())


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_boxes(shared, reference_predictor, name):
    image = read_image(shared / "media" / name)
    result = reference_predictor(image)
    expected = np.array(sorted(REFERENCE[name], key=lambda row: -row[5]))
    xyxy = cxcywh_to_xyxy(expected[:, 1:5]) * np.tile(result.size, 2)
    np.testing.assert_array_equal(result.found.cls, expected[:, 0])
    np.testing.assert_allclose(result.found.conf, expected[:, 5], atol=0.005)
    np.testing.assert_allclose(result.found.xyxy, xyxy, atol=1)
    assert result.image is image


def test_predictor_brings_boxes_back():
    predictor = fixed()
    result = predictor(np.zeros((1080, 1920, 3), np.uint8))
    assert predictor.runner.network.shapes == [(1, 3, 384, 640)]
    # 1920x1080 at a third, 12 rows of padding above: (288, 176, 352, 208) -> ((288, 164, 352, 196) * 3
    np.testing.assert_allclose(result.found.xyxy, [[864, 492, 1056, 588]])
    assert result.found.conf == pytest.approx([0.9]) and result.found.cls.tolist() == [0]


def test_predictor_gives_rgb_in_0_1():
    seen = []
    predictor = fixed()
    predictor.runner.network = type("Spy", (FixedNetwork,), {"__call__": lambda self, images: seen.append(images.clone()) or [self.rows]})()
    predictor(np.full((32, 32, 3), (255, 51, 0), np.uint8))
    np.testing.assert_allclose(seen[0][0, :, 5, 5], [0, 0.2, 1], atol=1e-6)


def test_predictor_without_boxes():
    result = fixed(rows=[])(np.zeros((50, 60, 3), np.uint8))
    assert result.found.xyxy.shape == (0, 4) and result.found.conf.shape == result.found.cls.shape == (0,)
    assert (result.plot() == result.image).all() and result.crop() == []


def test_predictor_options():
    rows = [(320, 192, 64, 32, 0.9, 1.0, 0.0), (321, 192, 64, 32, 0.8, 0.0, 1.0), (100, 192, 64, 32, 0.7, 0.0, 1.0)]
    image = np.zeros((384, 640, 3), np.uint8)
    assert fixed(rows)(image).found.cls.tolist() == [0, 1, 1]
    assert fixed(rows, agnostic=True)(image).found.cls.tolist() == [0, 1]
    assert fixed(rows, classes=(1,))(image).found.conf == pytest.approx([0.8, 0.7])
    assert fixed(rows, max_det=1)(image).found.cls.tolist() == [0]
    assert len(fixed(rows, conf_thres=0.75)(image).found.cls) == 2


@pytest.mark.parametrize("classes", [(2,), (-1,), (0, 80)])
def test_unknown_class_number(classes):
    with pytest.raises(UserError, match=rf"--classes {classes[-1]}: .* classes 0 to 1 \(cat to dog\)"):
        fixed(classes=classes)


# --- results -------------------------------------------------------------------------------------------------------------------------------


def test_crops_hold_their_boxes():
    result = result_of([(10.4, 20.6, 30.2, 40.1, 0.9, 0), (90, 70, 100, 80, 0.8, 1), (100, 80, 100, 80, 0.7, 1)])
    assert [crop.shape for crop in result.crop()] == [(21, 21, 3), (10, 10, 3), (1, 1, 3)]


def test_style_changes_the_drawing():
    result = result_of([(10, 30, 60, 70, 0.9, 1)])
    pictures = [result.plot(*style) for style in (Style(), Style(conf=False), Style(labels=False), Style(line_width=5))]
    for n, picture in enumerate(pictures):
        assert (picture != result.image).any()
        assert all((picture != other).any() for other in pictures[:n])
    assert (result.image == 50).all()


def test_tally_by_hand():
    tally = Tally(("cat", "dog", "cow"))
    tally.add(result_of([(0, 0, 5, 5, 0.9, 1), (5, 5, 9, 9, 0.8, 1), (5, 5, 9, 9, 0.8, 0)], names=tally.names), 2.0)
    tally.add(result_of([], names=tally.names), 3.0)
    tally.add(result_of([(0, 0, 5, 5, 0.9, 1)], names=tally.names), 1.0)
    assert (tally.images, tally.load_ms) == (3, 6.0)
    lines = [line.split() for line in tally.table().splitlines()]
    assert lines == [["class", "images", "boxes"], ["all", "3", "4"], ["dog", "2", "3"], ["cat", "1", "1"]]


def test_file_name_stays_one_part():
    assert file_name("../../etc/passwd") == "_.._etc_passwd"
    assert file_name("traffic light") == "traffic light"
    assert file_name("..") == file_name("") == file_name("/") == "_"
    assert file_name("人/a") == "人_a" and file_name("C++ <1m") == "C++ _1m"


# --- pipeline and writer -------------------------------------------------------------------------------------------------------------------


def test_video_keeps_order_rate_and_count(tmp_path):
    torch.set_num_threads(3)
    predictor = fixed(rows=[], wait_s=(0.001, 0.03, 0.005))  # late ones must not be overtaken
    tally = detect(source_of(frames_of("clip.avi", 30)), predictor, writer_of(tmp_path / "out"))
    assert tally.images == 30 and not our_threads()
    assert predictor.runner.network.most_inside == 3, "images on three threads at a time"
    assert names_below(tmp_path / "out") == ["clip.mp4"]
    assert video_facts(tmp_path / "out" / "clip.mp4") == (30, 12.5, (64, 48))
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    brightness = [capture.read()[1].mean() for _ in range(30)]
    assert brightness == sorted(brightness) and brightness[-1] > 20


def test_videos_and_images_in_turn(tmp_path):
    def frames() -> Iterator[Frame]:
        yield from frames_of("a/clip.mp4", 3)
        yield Frame("a/photo.mpo", 0, np.zeros((40, 30, 3), np.uint8), None)
        yield from frames_of("b/clip.mp4", 4)
        yield from frames_of("b/clip.mp4", 2, size=(32, 32))
        yield from frames_of("b/again.mp4", 3)
        yield from frames_of("b/again.mp4", 3)
        yield Frame("b/photo.png", 0, np.zeros((40, 30, 3), np.uint8), None)
        yield from (f._replace(index=f.index + 5) for f in frames_of("rtsp://host/cam?x=1", 2))
        yield from (f._replace(index=f.index + 7) for f in frames_of("rtsp://host/cam?x=1", 2, size=(32, 32)))

    detect(source_of(frames()), fixed(), writer_of(tmp_path / "out", txt=True))
    out = tmp_path / "out"
    assert [name for name in names_below(out) if "labels" not in name] == [
        "again.mp4", "clip.mp4", "clip_2.mp4", "photo.jpg", "photo_2.png", "rtsp_host_cam_from_6.mp4", "rtsp_host_cam_from_8.mp4"]
    assert video_facts(out / "clip.mp4")[0] == video_facts(out / "again.mp4")[0] == 3
    assert video_facts(out / "clip_2.mp4")[2] == (32, 32)
    assert {"labels/clip_1.txt", "labels/clip_3.txt", "labels/photo.txt", "labels/photo_2.txt"} < set(names_below(out))


def test_labels_crops_and_table(tmp_path):
    names = ("cat", "../dog")
    frame = Frame("in/photo.jpg", 0, np.zeros((80, 100, 3), np.uint8), None)
    found = result_of([(10, 20, 30, 40, 0.875, 0), (50, 40, 100, 80, 0.5, 1), (0, 0, 10, 10, 0.25, 0)], names=names)
    with writer_of(tmp_path / "out", txt=True, txt_conf=True, csv=True, crops=True, images=False) as writer:
        writer.put(frame, found)
        writer.put(frame._replace(path="in/empty.jpg"), result_of([], names=names))
        writer.put(frame._replace(path="in/cam.mp4", index=6, video=VideoInfo(25, 9, 100, 80)), result_of([(10, 20, 30, 40, 0.5, 0)], names=names))
    out = tmp_path / "out"
    assert names_below(out) == ["crops/_dog/photo.jpg", "crops/cat/cam_7.jpg", "crops/cat/photo.jpg", "crops/cat/photo2.jpg", "labels/cam_7.txt",
                                "labels/photo.txt", "predictions.csv"]
    assert (out / "labels/photo.txt").read_text() == "0 0.2 0.375 0.2 0.25 0.875\n1 0.75 0.75 0.5 0.5 0.5\n0 0.05 0.0625 0.1 0.125 0.25\n"
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["in/photo.jpg"] * 3 + ["in/cam.mp4"]
    assert rows[1] == {"image": "in/photo.jpg", "frame": "", "class": "1", "name": "../dog", "confidence": "0.5", "x1": "50", "y1": "40", "x2": "100",
                       "y2": "80"}
    assert rows[3]["frame"] == "7"


def test_labels_are_called_like_their_images(tmp_path):
    """They would not be found else; and a video's frames and an image of such a name keep out of each other's way."""
    image = Frame("", 0, np.zeros((48, 64, 3), np.uint8), None)
    stems = ["photo (1)", "a,b", "R&D+x", "cafe\u0301", "हिन्दी", "caf\udce9"]
    with writer_of(tmp_path / "out", txt=True, csv=True) as writer:
        for path in (*(f"in/{stem}.png" for stem in stems), "in/clip_2.png"):
            writer.put(image._replace(path=path), result_of([(10, 20, 30, 40, 0.9, 0)]))
        for frame in frames_of("in/clip.mp4", 2):
            writer.put(frame, result_of([(10, 20, 30, 40, 0.9, 0)]))
        for path in ("in/clip_3_2.png", "in/clip.png"):
            writer.put(image._replace(path=path), result_of([(10, 20, 30, 40, 0.9, 0)]))
    videos, later = ["clip_3_1", "clip_3_2"], ["clip_3_2_2", "clip"]
    assert {path.stem for path in (tmp_path / "out/labels").iterdir()} == {*stems, "clip_2", *videos, *later}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {*stems, "clip_2", *later} and (tmp_path / "out/clip_3.mp4").exists()


def test_crops_of_classes_that_differ_in_signs_alone(tmp_path):
    found = result_of([(10, 20, 30, 40, 0.9, n) for n in range(4)], names=("<1m", ">1m", "C++", "C#"))
    with writer_of(tmp_path / "out", crops=True, images=False) as writer:
        writer.put(Frame("a.jpg", 0, np.zeros((80, 100, 3), np.uint8), None), found)
    assert names_below(tmp_path / "out/crops") == ["C#/a.jpg", "C++/a.jpg", "_1m_0/a.jpg", "_1m_1/a.jpg"]


def test_a_live_video_lasts_as_long_as_life(tmp_path):
    """Frames that nobody took in time are shown as the one after them; a long silence is cut short."""
    with writer_of(tmp_path / "out") as writer:
        for frame in frames_of("rtsp://host/cam", 1):
            for index in (0, 1, 4, 5, 1000):
                writer.put(frame._replace(index=index), result_of([(10, 20, 30, 40, 0.9, 0)]))
    assert video_facts(next((tmp_path / "out").glob("*.mp4")))[0] == 6 + 125


@pytest.mark.parametrize("fps", [29.97003, 119.96712, 240.123, 960.5])
def test_frame_rates_of_phones(fps: float, tmp_path):
    detect(source_of(frames_of("clip.mp4", 3, fps=fps)), fixed(), writer_of(tmp_path / "out"))
    count, written, _ = video_facts(tmp_path / "out" / "clip.mp4")
    assert count == 3 and written == pytest.approx(fps, rel=1e-3)


def test_nothing_to_write_makes_no_folder(tmp_path):
    tally = detect(source_of(frames_of("clip.mp4", 3)), fixed(), writer_of(tmp_path / "out", images=False))
    assert tally.images == 3 and tally.boxes == 3 and not (tmp_path / "out").exists()


def test_memory_stays_flat(tmp_path):
    alive, most = 0, 0

    def died() -> None:
        nonlocal alive
        alive -= 1

    def frames() -> Iterator[Frame]:
        nonlocal alive, most
        for frame in frames_of("clip.mp4", 120):
            weakref.finalize(frame.image, died)
            alive += 1
            most = max(most, alive)
            yield frame

    detect(source_of(frames()), fixed(), writer_of(tmp_path / "out"))
    # 4 decoded ahead and 1 being put, 5 in or before inference, 2 to draw and 1 in drawing, 4 to encode and 1 being encoded, 2 in hand
    assert 0 < most <= 20


class Boom(Exception):
    pass


def failing_frames() -> Iterator[Frame]:
    yield from frames_of("clip.mp4", 6)
    raise UserError("clip.mp4: broke off")


class FailingNetwork(FixedNetwork):
    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        if self.calls == 5:
            raise Boom
        return super().__call__(images)


def test_error_of_the_source(tmp_path):
    with pytest.raises(UserError, match="broke off"):
        detect(source_of(failing_frames()), fixed(), writer_of(tmp_path / "out", csv=True))
    assert names_below(tmp_path / "out") == [] and not our_threads()


def test_error_of_the_network(tmp_path):
    predictor = fixed()
    predictor.runner.network = FailingNetwork(ONE_BOX)
    with pytest.raises(Boom):
        detect(source_of(frames_of("clip.mp4", 500)), predictor, writer_of(tmp_path / "out", csv=True))
    assert names_below(tmp_path) == [] and not our_threads()


def test_error_of_the_writer(tmp_path):
    (tmp_path / "crops").write_text("in the way")
    with pytest.raises(OSError, match="crops"):
        detect(source_of(frames_of("clip.mp4", 500)), fixed(), ResultWriter(lambda: tmp_path, Outputs(crops=True, csv=True)))
    assert names_below(tmp_path) == ["crops"] and not our_threads()


@pytest.mark.parametrize("live", [False, True])
def test_ctrl_c(tmp_path, monkeypatch, live):
    writer = writer_of(tmp_path / "out", csv=True)
    put = writer.put

    def interrupted(frame: Frame, result: Result) -> None:
        if frame.index == 5:
            raise KeyboardInterrupt
        put(frame, result)

    monkeypatch.setattr(writer, "put", interrupted)

    def frames() -> Iterator[Frame]:
        for frame in frames_of("cam", 50):
            time.sleep(0.005)  # a live source drops frames that nobody takes in time
            yield frame if frame.index < 5 else frame._replace(index=5)

    source = source_of(frames(), live)
    if live:
        assert detect(source, fixed(), writer).images > 0
        assert names_below(tmp_path / "out") == ["cam.mp4", "predictions.csv"]
    else:
        with pytest.raises(KeyboardInterrupt):
            detect(source, fixed(), writer)
        assert names_below(tmp_path / "out") == []
    assert not our_threads()


def test_thread_count_is_left_as_it_was(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        detect(source_of(frames_of("clip.mp4", 2)), fixed(), writer_of(tmp_path / "out"))
        with ThreadPoolExecutor(1) as pool:  # a new thread takes the process's setting
            assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


# --- the script ----------------------------------------------------------------------------------------------------------------------------


def run(shared: Path, tmp_path: Path, source: Path | str, *flags: str, code: int = 0) -> Path:
    """The run's folder after a detect.py that must end so."""
    weights = str(shared / "weights" / "yolov5n.pt")
    assert script.main(["--weights", weights, "--source", str(source), "--project", str(tmp_path / "runs"), "--device", "cpu", *flags]) == code
    return tmp_path / "runs" / "exp"


def test_every_saving_flag(shared, tmp_path, capsys):
    media = tmp_path / "media"
    (media / "other").mkdir(parents=True)
    for name in REFERENCE:
        (media / name).write_bytes((shared / "media" / name).read_bytes())
    (media / "other" / "bus.jpg").write_bytes((shared / "media" / "bus.jpg").read_bytes())
    cv2.imwrite(str(media / "blank.png"), np.full((200, 300, 3), 114, np.uint8))
    (media / "broken.jpg").write_bytes((shared / "media" / "bus.jpg").read_bytes()[:20_000])
    listed = ("bus.jpg", "zidane.jpg", "blank.png", "broken.jpg", "other/bus.jpg")
    (tmp_path / "list.txt").write_text("# photographs\n" + "".join(f"media/{name}\n" for name in listed))

    out = run(shared, tmp_path, tmp_path / "list.txt", "--precision", "fp32", "--save-txt", "--save-conf", "--save-csv", "--save-crop", code=2)
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err and "Traceback" not in printed.err
    assert names_below(out) == sorted([
        "blank.png", "bus.jpg", "bus_2.jpg", "zidane.jpg", "predictions.csv", "labels/bus.txt", "labels/bus_2.txt", "labels/zidane.txt",
        "crops/bus/bus.jpg", "crops/bus/bus_2.jpg", "crops/tie/zidane.jpg", *(f"crops/person/bus{n}.jpg" for n in ("", 2, 3, 4)),
        *(f"crops/person/bus_2{n}.jpg" for n in ("", 2, 3, 4)), *(f"crops/person/zidane{n}.jpg" for n in ("", 2, 3))])
    for name, rows in REFERENCE.items():
        got = np.loadtxt(out / "labels" / f"{Path(name).stem}.txt")
        np.testing.assert_allclose(got, sorted(rows, key=lambda row: -row[5]), atol=0.005)
    assert (out / "labels/bus.txt").read_text() == (out / "labels/bus_2.txt").read_text()
    with open(out / "predictions.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 14
    assert (read_image(out / "blank.png") == 114).all()
    assert (read_image(out / "bus.jpg") != read_image(media / "bus.jpg")).any()
    assert ["all", "4", "14"] in [line.split() for line in printed.out.splitlines()]
    assert str(out) in printed.out and "images/s" in printed.out


def test_flags_that_select_and_draw(shared, tmp_path):
    bus = shared / "media" / "bus.jpg"
    drawing = ("--hide-labels", "--line-thickness", "1")
    out = run(shared, tmp_path, str(shared / "media" / "b*.jpg"), "--classes", "5", "2", "--max-det", "1", "--save-txt", *drawing)
    lines = (out / "labels/bus.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("5 0.52")
    run(shared, tmp_path, bus, "--imgsz", "320", "256", "--augment", "--agnostic-nms", "--conf", "0.5", "--nosave", "--save-txt", "--name", "small")
    small = tmp_path / "runs" / "small"
    assert names_below(small) == ["labels/bus.txt"]
    assert all(len(line.split()) == 5 for line in (small / "labels/bus.txt").read_text().splitlines())  # no confidences


def test_video_in_video_out(shared, tmp_path):
    bus = cv2.resize(read_image(shared / "media" / "bus.jpg"), (202, 270))
    write_video(tmp_path / "tiny.mp4", [np.roll(bus, 4 * k, axis=1) for k in range(9)], 10)
    out = run(shared, tmp_path, tmp_path / "tiny.mp4", "--imgsz", "256", "--save-txt")
    assert video_facts(out / "tiny.mp4") == (9, 10, (202, 270)) == video_facts(tmp_path / "tiny.mp4")
    assert {f"labels/tiny_{k}.txt" for k in range(1, 10)} == set(names_below(out)) - {"tiny.mp4"}
    run(shared, tmp_path, tmp_path / "tiny.mp4", "--imgsz", "256", "--vid-stride", "2", "--exist-ok", "--name", "half")
    assert video_facts(tmp_path / "runs" / "half" / "tiny.mp4") == (5, 5, (202, 270))


class Hostile:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "broken.mp4"], r"broken\.mp4: can't be read as a video"),
        (["--source", "none.jpg"], r"none\.jpg: no such image"),
        (["--source", "broken.jpg"], "broken.jpg: "),
        (["--weights", "none.pt"], r"none\.pt: no such weights"),
        (["--weights", "hostile.pt"], r"hostile\.pt: .*system"),
        (["--weights", "broken.mp4"], r"broken\.mp4"),
        (["--classes", "80"], "--classes 80: .*0 to 79"),
        (["--imgsz", "8"], "--imgsz 8: .*32"),
        (["--imgsz", "64", "64", "64"], "--imgsz 64 64 64"),
        (["--conf-thres", "2"], "--conf-thres 2"),
        (["--half"], "--half"),
        (["--project", "broken.jpg/runs"], r"broken\.jpg.*choose a folder"),
        (["--view-img"], "--view-img: no window"),
    ],
)
def test_mistakes_are_one_line(shared, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("QT_QPA_PLATFORM", "xcb")
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 5000)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8" + b"\0" * 5000)
    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    before = names_below(tmp_path)
    good = ["--weights", str(shared / "weights" / "yolov5n.pt"), "--source", str(shared / "media" / "bus.jpg"), "--imgsz", "64", "--device", "cpu"]
    assert script.main([*good, *flags]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and re.search(message, error[0]), error
    assert names_below(tmp_path) == before and not our_threads()


def test_help_needs_no_torch():
    code = "import sys, detect\ntry: detect.main(['--help'])\nexcept SystemExit: pass\nassert not {'torch', 'cv2', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(script.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--vid-stride" in done.stdout


@pytest.mark.slow
def test_street_whole(shared, tmp_path):
    out = run(shared, tmp_path, shared / "media" / "street.mp4", "--save-txt")
    assert video_facts(out / "street.mp4") == (250, 25, (1920, 1080))
    people = [sum(line.startswith("0 ") for line in path.read_text().splitlines()) for path in (out / "labels").iterdir()]
    assert len(people) == 250 and np.mean(people) > 8
