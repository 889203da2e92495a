"""Everything detect reads, and the video that it writes. Frames carry their number, so that order and count are checked."""
from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import sys
import threading
import time

import cv2
import numpy as np
import pytest

import utils.data.sources as sources
from utils.data.sources import natural_key, open_source
from utils.deploy.video_writer import VideoWriter
from utils.errors import UserError

BITS = 8


def _numbered(number: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """The number as light and dark columns, which every codec keeps apart."""
    bits = np.array([220 if number >> i & 1 else 30 for i in range(BITS)], np.uint8)
    return np.ascontiguousarray(np.broadcast_to(np.repeat(bits, size[0] // BITS)[None, :, None], (size[1], size[0], 3)))


def _number(image: np.ndarray) -> int:
    columns = image.reshape(image.shape[0], BITS, -1).mean((0, 2))
    return sum(1 << i for i in range(BITS) if columns[i] > 125)


def _video(path, count: int = 30, fps: float = 12.5, size: tuple[int, int] = (64, 48)):
    with VideoWriter(path, fps, size) as writer:
        for number in range(count):
            writer.write(_numbered(number, size))
    return path


def _image(path, number: int = 0):
    cv2.imwrite(str(path), _numbered(number))
    return path


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in ("frame source", "video writer")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not _threads()


# Images, folders, globs, lists


def test_one_image(tmp_path):
    path = _image(tmp_path / "a.png", 3)
    with open_source(str(path)) as source:
        (frame,) = source
    assert frame.path == str(path) and frame.index == 0 and frame.video is None and not source.live
    assert frame.image.shape == (48, 64, 3) and _number(frame.image) == 3
    assert list(source) == [], "a source is gone through once"


def test_folder_in_natural_order_with_other_files_left_out(tmp_path):
    for number in (10, 2, 1):
        _image(tmp_path / f"f{number}.png", number)
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "sub.png").mkdir()
    with open_source(str(tmp_path)) as source:
        assert [_number(f.image) for f in source] == [1, 2, 10]
    with open_source(str(tmp_path / "f1*.png")) as source:
        assert [_number(f.image) for f in source] == [1, 10]


def test_folder_of_images_and_videos(tmp_path):
    _image(tmp_path / "a.jpg")
    _video(tmp_path / "b.mp4", count=3)
    _image(tmp_path / "c.png", 7)
    with open_source(str(tmp_path)) as source:
        assert [(f.path[-5:], f.index, f.video is None) for f in source] == [
            ("a.jpg", 0, True), ("b.mp4", 0, False), ("b.mp4", 1, False), ("b.mp4", 2, False), ("c.png", 0, True)
        ]  # fmt: skip


def test_a_broken_file_among_others_is_skipped(tmp_path, capsys):
    _image(tmp_path / "a.png", 1)
    (tmp_path / "b.mp4").write_bytes(b"no video at all")
    (tmp_path / "c.jpg").write_bytes(b"no image")
    _image(tmp_path / "d.png", 2)
    with open_source(str(tmp_path)) as source:
        assert [_number(frame.image) for frame in source] == [1, 2] and source.missed == 2
    said = capsys.readouterr().err
    assert "skipped" in said and "b.mp4: can't be read as a video" in said and "c.jpg" in said
    (tmp_path / "a.png").unlink(), (tmp_path / "d.png").unlink()
    with open_source(str(tmp_path)) as source, pytest.raises(UserError, match="none of its 2 files can be read"):
        list(source)


@pytest.mark.parametrize("ordered", [["a", "b2", "b10"], ["1", "02", "x"], ["2", "²"], ["A1", "a2"]])
def test_natural_order(ordered):
    assert sorted(reversed(ordered), key=natural_key) == ordered


def test_list_with_blanks_comments_and_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "work").mkdir()
    _image(tmp_path / "lists" / "beside.png", 1)
    _image(tmp_path / "work" / "here.png", 2)
    absolute = _image(tmp_path / "far.png", 3)
    listing = tmp_path / "lists" / "all.txt"
    listing.write_text(f"\ufeff# my pictures\n\n  {absolute}  \nhere.png\n./beside.png\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "work")
    with open_source(str(listing)) as source:
        assert [_number(f.image) for f in source] == [3, 2, 1]


def test_broken_image_is_warned_of_and_skipped(tmp_path, capsys):
    _image(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    _image(tmp_path / "c.png", 2)
    with open_source(str(tmp_path)) as source:
        assert [_number(f.image) for f in source] == [1, 2]
    warning = capsys.readouterr().err
    assert "b.png" in warning and warning.count("warning:") == 1


def test_nothing_readable(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"nothing")
    with open_source(str(tmp_path)) as source, pytest.raises(UserError, match="none of its 2 files"):
        list(source)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imagez/a.png", "no such image"),
        ("images/zebra.pgn", "did you mean zebra.png"),
        ("images/notes.md", "neither an image"),
        ("empty", "0 files there"),
        ("images/*.bmp", "0 files there"),
        ("blank.txt", "names no file"),
        ("wrong.txt", "wrong.txt:2: model.pt is neither"),
        ("http://127.0.0.1:1/a.jpg", "download it"),
        ("list.streams", "one stream at a time: start a detect.py for each of its lines"),
        ("cameras.txt", r"cameras.txt:2: rtsp://cam \[1\]/x is a stream, and streams are shown one at a time"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "empty").mkdir()
    _image(tmp_path / "images" / "zebra.png")
    (tmp_path / "images" / "notes.md").touch()
    (tmp_path / "blank.txt").write_text("# nothing\n\n")
    (tmp_path / "wrong.txt").write_text("a.png\nmodel.pt\n")
    (tmp_path / "list.streams").write_text("rtsp://cam/1\n")
    (tmp_path / "cameras.txt").write_text("a.png\nrtsp://cam [1]/x\n")
    with pytest.raises(UserError, match=words):
        open_source(text)


def test_a_path_with_glob_signs_is_taken_literally(tmp_path):
    _image(tmp_path / "a[1].png", 4)
    with open_source(str(tmp_path / "a[1].png")) as source:
        assert [_number(f.image) for f in source] == [4]


# Videos


def test_video_frames_come_in_order_and_complete(tmp_path):
    path = _video(tmp_path / "v.mp4", count=30)
    with open_source(str(path)) as source:
        frames = list(source)
    assert [_number(f.image) for f in frames] == [f.index for f in frames] == list(range(30))
    assert frames[0].video == (12.5, 30, 64, 48) and {f.path for f in frames} == {str(path)}


def test_video_stride(tmp_path):
    with open_source(str(_video(tmp_path / "v.mp4", count=30)), vid_stride=7) as source:
        assert [(f.index, _number(f.image)) for f in source] == [(0, 0), (1, 7), (2, 14), (3, 21), (4, 28)]
    with pytest.raises(UserError, match="--vid-stride"):
        open_source(str(tmp_path / "v.mp4"), vid_stride=0)


def test_leaving_early_ends_the_thread_and_few_frames_are_held(tmp_path, monkeypatch):
    made = []
    original = sources._images
    monkeypatch.setattr(sources, "_images", lambda *a: (made.append(1) or pair for pair in original(*a)))
    with open_source(str(_video(tmp_path / "v.mp4", count=30))) as source:
        assert _number(next(source).image) == 0
        time.sleep(0.2)
        assert _threads() == ["frame source"]
        assert len(made) <= sources._AHEAD + 2
    assert not _threads()
    assert list(source) == []


def test_a_source_never_gone_through_starts_no_thread(tmp_path):
    source = open_source(str(_image(tmp_path / "a.png")))
    assert not _threads()
    source.close()
    source.close()


@pytest.mark.parametrize("content", [b"", b"no video at all"])
def test_unreadable_video(tmp_path, content):
    (tmp_path / "v.mp4").write_bytes(content)
    with open_source(str(tmp_path / "v.mp4")) as source, pytest.raises(UserError, match=r"v\.mp4: can't be read as a video"):
        next(source)


def test_truncated_video_gives_what_it_has_and_says_so(tmp_path, capsys):
    data = _video(tmp_path / "v.mkv", count=60).read_bytes()
    (tmp_path / "v.mkv").write_bytes(data[: len(data) // 2])
    with open_source(str(tmp_path / "v.mkv")) as source:
        numbers = [_number(f.image) for f in source]
        assert source.missed == 1
    assert 5 < len(numbers) < 55 and numbers[:-1] == list(range(len(numbers) - 1))
    assert f"broken off after frame {len(numbers)} of 60" in capsys.readouterr().err


@pytest.mark.parametrize("stride", [1, 3])
def test_damaged_frames_in_the_middle_cost_themselves_only(tmp_path, capsys, stride):
    path = _video(tmp_path / "v.mp4", count=40)
    data = bytearray(path.read_bytes())
    whole = cv2.VideoCapture(str(path))
    start = data.index(b"mdat") + 4
    end = data.find(b"moov", start)
    middle = (start + end) // 2 if end > 0 else len(data) // 2
    data[middle : middle + len(data) // 10] = bytes(len(data) // 10)
    path.write_bytes(data)
    capture, decoded = cv2.VideoCapture(str(path)), 0
    for _ in range(200):
        decoded += capture.grab()
    with open_source(str(path), vid_stride=stride) as source:
        seen = [_number(f.image) for f in source]
        assert source.missed == 1
    assert whole.get(cv2.CAP_PROP_FRAME_COUNT) == 40 and 20 < decoded < 40
    assert len(seen) >= decoded // stride - 2 and seen[0] == 0 and seen[-1] > 30
    lost = re.search(r"v\.mp4: (\d+) of its frames are damaged and left out", capsys.readouterr().err)
    assert int(lost[1]) + decoded == 40


class _Fake:
    """A capture of numbered frames, some of them damaged."""

    def __init__(self, good, frames=0, fps=25.0):
        self.good, self.place, self.told = good, -1, {cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_FRAME_COUNT: frames}

    def get(self, what):
        return self.told.get(what, max(self.place, 0) * 1000 / self.told[cv2.CAP_PROP_FPS])

    def grab(self):
        self.place += 1
        return self.place < len(self.good) and self.good[self.place]

    def retrieve(self):
        return True, np.full((2, 2, 3), self.place, np.uint8)

    def isOpened(self):
        return True


def test_a_stride_is_kept_behind_damaged_frames(monkeypatch, tmp_path, capsys):
    path = _video(tmp_path / "v.mp4", 2)
    good = [not 25 <= n < 65 for n in range(85)]
    monkeypatch.setattr(sources, "_capture", lambda address: contextlib.nullcontext(_Fake(good, frames=100)))
    with open_source(str(path), vid_stride=10) as source:
        assert [int(f.image[0, 0, 0]) for f in source] == [0, 10, 20, 65, 75] and source.missed == 2
    assert "40 of its frames are damaged" in (told := capsys.readouterr().err) and "broken off after frame 76 of 100" in told


def test_a_damaged_file_behind_an_address_ends(monkeypatch):
    good = [not 40 <= n < 50 for n in range(100)]
    monkeypatch.setattr(sources, "_capture", lambda address: contextlib.nullcontext(_Fake(good, frames=100, fps=1000.0)))
    frames = list(sources._stream_frames("http://127.0.0.1:9/clip", "clip", 1, threading.Event()))
    assert [frame.index for frame in frames] == list(range(90)) and frames[0].video.fps == 30


def test_a_camera_that_falls_silent_is_waited_for_once(monkeypatch):
    monkeypatch.setattr(sources, "_TIMEOUT_MS", 200)
    fake = _Fake([True] * 3)
    grab = fake.grab
    waited = []
    monkeypatch.setattr(fake, "grab", lambda: grab() or (waited.append(time.sleep(0.25)), False)[1])
    assert len(list(sources._images(fake, 1, threading.Event()))) == 3 and len(waited) == 1


def test_a_video_of_uneven_frames_is_whole(monkeypatch, tmp_path, capsys):
    """Its container tells seconds, of which OpenCV makes a number of frames."""
    path = _video(tmp_path / "v.mp4", count=20)

    class Uneven:
        def __init__(self, *_):
            self.capture = cv2.VideoCapture(str(path))

        def get(self, what):
            times = {cv2.CAP_PROP_FRAME_COUNT: 4, cv2.CAP_PROP_POS_MSEC: 4}
            return self.capture.get(what) * times.get(what, 1)

        def __getattr__(self, name):
            return getattr(self.capture, name)

    monkeypatch.setattr(sources, "_capture", lambda address: contextlib.nullcontext(Uneven()))
    with open_source(str(path)) as source:
        assert len(list(source)) == 20 and source.missed == 0
    assert "broken off" not in capsys.readouterr().err


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    _video(tmp_path / "2024-05-01T10:30:00.mp4", 5)
    monkeypatch.chdir(tmp_path)
    with open_source("2024-05-01T10:30:00.mp4") as source:
        assert [frame.path for frame in source] == ["2024-05-01T10:30:00.mp4"] * 5
    with VideoWriter("exp:1/out.mp4", 25, (64, 48)) as video:
        video.write(_numbered(0))
    assert (tmp_path / "exp:1" / "out.mp4").exists()


def test_errors_of_the_thread_reach_the_consumer(tmp_path, monkeypatch):
    def broken(*_):
        yield _numbered(0), sources.VideoInfo(25, 9, 64, 48), 0, 0
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(sources, "_images", broken)
    with open_source(str(_video(tmp_path / "v.mp4", count=2))) as source:
        next(source)
        with pytest.raises(ZeroDivisionError, match="inside"):
            next(source)


def test_street_video(shared):
    count = 0
    with open_source(str(shared / "media" / "street.mp4"), vid_stride=25) as source:
        for frame in source:
            count += 1
            assert frame.video == (25.0, 250, 1920, 1080) and frame.image.shape == (1080, 1920, 3)
    assert count == 10


# Streams


class _Mjpeg(http.server.ThreadingHTTPServer):
    """Numbered frames; the first connection ends after `first` of them, later ones after `later`, and from `refuse_from` on none is given."""

    daemon_threads = True

    def __init__(self, first: int, later: int = 40, refuse_from: int = 99, gap_s: float = 0.01) -> None:
        super().__init__(("127.0.0.1", 0), _MjpegHandler)
        self.first, self.later, self.refuse_from, self.gap_s = first, later, refuse_from, gap_s
        self.connections, self.sent = 0, 0
        self.url = f"http://user:secret@127.0.0.1:{self.server_port}/live"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """A consumer that leaves is no error."""


class _MjpegHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.connections += 1
        if server.connections >= server.refuse_from:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for _ in range(server.first if server.connections == 1 else server.later):
            jpeg = cv2.imencode(".jpg", _numbered(server.sent % 40))[1].tobytes()
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg))
            server.sent += 1
            time.sleep(server.gap_s)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sources, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(sources, "_RETRIES", 3)


def test_a_dropped_stream_is_taken_up_again(quick, capsys):
    with _Mjpeg(first=8) as server, open_source(server.url) as source:
        assert source.live
        seen = []
        while server.connections < 2 or len(seen) < 12:
            seen.append(next(source))
    indices, numbers = [f.index for f in seen], [_number(f.image) for f in seen]
    assert indices == sorted(set(indices)) and numbers == sorted(set(numbers))
    assert seen[0].video.frames == 0 and seen[0].video[2:] == (64, 48)
    output = capsys.readouterr()
    assert "reconnecting in" in output.err and "reconnected" in output.out
    assert "secret" not in output.err + output.out + seen[0].path


@pytest.mark.parametrize("live", [True, False])
def test_a_source_ends_between_two_of_its_frames(live: bool, tmp_path, capsys):
    with _Mjpeg(first=4000) as server:
        source = open_source(server.url if live else str(_video(tmp_path / "v.mp4", count=3000)), vid_stride=1400)
        with source:
            next(source)
            time.sleep(0.1 * live)  # a file's next is there soon
            start = time.monotonic()
        assert time.monotonic() - start < 3 and not source._thread.is_alive()
    assert capsys.readouterr().err == ""


def test_retries_are_counted_anew_after_each_success(quick):
    with _Mjpeg(first=8, later=8) as server, open_source(server.url) as source:
        while server.connections < 7:
            next(source)


def test_a_slow_camera_keeps_its_time(quick):
    with _Mjpeg(first=12, later=0, refuse_from=2, gap_s=0.2) as server, open_source(server.url) as source:
        seen = [next(source) for _ in range(8)]
    assert seen[-1].video.fps == 25 and seen[-1].index > 2 * 7, "25 a second are declared, 5 come, the first few at once"


def test_a_stream_that_stays_away_ends_after_bounded_retries(quick):
    with _Mjpeg(first=8, refuse_from=2) as server, open_source(server.url) as source:
        with pytest.raises(UserError, match="3 attempts to reconnect failed"):
            list(source)
        assert server.connections == 4


def test_a_slow_consumer_gets_the_latest_frame():
    with _Mjpeg(first=40, gap_s=0.02) as server, open_source(server.url) as source:
        next(source)
        time.sleep(0.4)
        sent = server.sent
        next(source)  # the one that lay ready
        assert _number(next(source).image) >= sent - 8


@pytest.mark.parametrize("text", ["http://127.0.0.1:9/live", "99"])
def test_what_can_not_be_opened(text):
    with open_source(text) as source, pytest.raises(UserError, match="can't be opened"):
        next(source)


def test_closing_while_waiting_to_reconnect_is_quick(monkeypatch):
    monkeypatch.setattr(sources, "_BACKOFF_S", 60)
    with _Mjpeg(first=8) as server, open_source(server.url) as source:
        while server.sent < 8:
            next(source)
        time.sleep(0.2)
        start = time.monotonic()
        source.close()
    assert time.monotonic() - start < 5


# The writer


@pytest.mark.parametrize("fps", [5.0, 12.5, 25.0, 29.97, 59.94])
def test_writer_keeps_fps_and_count(tmp_path, fps):
    path = _video(tmp_path / "out.mp4", count=17, fps=fps)
    with open_source(str(path)) as source:
        frames = list(source)
    assert len(frames) == 17 == frames[0].video.frames
    assert frames[0].video.fps == pytest.approx(fps, rel=1e-4)


def test_writer_is_atomic(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"the last run's")
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 10, (64, 48)) as writer:
        writer.write(_numbered(1))
        assert path.read_bytes() == b"the last run's"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"the last run's" and list(tmp_path.iterdir()) == [path]


def test_writer_without_frames_leaves_no_file(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", 10, (64, 48)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_writer_reports_what_fails(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="video can be written"):
        VideoWriter(tmp_path / "out.nonsense", 10, (64, 48))
    with VideoWriter(tmp_path / "out.mp4", 10, (64, 48)) as writer, pytest.raises(ValueError, match="a frame of"):
        writer.write(_numbered(1, (48, 64)))
    writer = VideoWriter(tmp_path / "lost.mp4", 10, (64, 48))
    writer.write(_numbered(0))
    writer._written += 1  # as if the disk had refused a frame
    with pytest.raises(UserError, match="only 1 of 2 frames"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_error_reaches_the_caller_and_blocks_nobody(tmp_path):
    writer = VideoWriter(tmp_path / "out.mp4", 10, (64, 48))
    encoder = writer._encoder

    class Broken:
        def write(self, image):
            raise cv2.error("encoder gave up")

        def release(self):
            encoder.release()

    writer._encoder = Broken()
    with pytest.raises(cv2.error, match="gave up"):
        for number in range(40):
            writer.write(_numbered(number % 20))
            time.sleep(0.001)
    with pytest.raises(cv2.error, match="gave up"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_addresses_that_are_none_or_lead_nowhere():
    with pytest.raises(UserError, match="no address: "):
        open_source("http://[abc/x.mp4")
    with open_source("http://127.0.0.1:9/a.mp4") as source, pytest.raises(UserError, match=r"http://127.0.0.1:9/a.mp4: can't be read as a video"):
        next(source)
    with open_source("rtsp://admin:p@ss@127.0.0.1:9/s") as source, pytest.raises(UserError, match=r"^rtsp://127.0.0.1:9/s: can't be opened"):
        next(source)
    with pytest.raises(UserError, match="no such image"):
        open_source("~nosuchuser/x.jpg")


def test_a_file_behind_an_address_that_does_not_say_so_ends(tmp_path, monkeypatch):
    made = _video(tmp_path / "clip.mp4", 12)
    monkeypatch.setattr(sources, "_BACKOFF_S", 0.01)
    real = sources._capture
    monkeypatch.setattr(sources, "_capture", lambda address: real(str(made)))
    with open_source("http://127.0.0.1:9/clip?id=3") as source:
        frames = [frame.index for frame in source]
    assert frames and frames == sorted(set(frames)) and frames[-1] < 12, "once, not over and over"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text")
def test_a_video_whose_name_is_no_text_is_left_out(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sources, "warn", said.append)
    _image(tmp_path / "a.png", 4)
    shutil.copy(_video(tmp_path / "clip.mp4", 3), os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4"))
    (tmp_path / "clip.mp4").unlink()
    with open_source(str(tmp_path)) as source:
        assert len(list(source)) == 1
    assert len(said) == 1 and "whose name is not UTF-8" in said[0]
