"""What detect reads: image, folder, glob, list file, video, webcam or stream, as one iterator of frames decoded ahead in a thread."""
from __future__ import annotations

import contextlib
import glob
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np

from utils.data.images import IMAGE_SUFFIXES, ImageError, read_image
from utils.errors import UserError
from utils.files import did_you_mean, is_text
from utils.log import info, warn

VIDEO_SUFFIXES = frozenset({".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
STREAM_SCHEMES = frozenset({"http", "https", "rtmp", "rtp", "rtsp", "rtsps", "tcp", "udp"})

_AHEAD = 4  # frames decoded in advance: enough to overlap with inference, little memory
_FALLBACK_FPS = 30.0  # where the file or device does not tell
_FASTEST = 120.0  # of a live source: more is declared, not given
_RETRIES = 6  # in a row, of a dropped stream
_BACKOFF_S = 0.5  # before the first retry; doubles with each
_TIMEOUT_MS = 10_000  # to connect to a stream, and to wait for its next frame
_CLOSE_S = 15.0  # how long close() waits for a stream that is stuck in a read
_NEARLY_ALL = 0.95  # of a video's frames, or of its seconds: containers only estimate
_BAD_IN_A_ROW = 64  # frames that can't be decoded: more are the end
_END = object()


class VideoInfo(NamedTuple):
    fps: float
    frames: int  # as the file says; 0 where unknown (streams)
    width: int
    height: int


class Frame(NamedTuple):
    path: str  # the file; for streams the address without its password
    index: int  # in its video or stream, 0 for an image; with a stride, the number among the frames shown; of a live source its time in frames
    image: np.ndarray  # (H, W, 3) uint8 BGR
    video: VideoInfo | None  # None for an image


Miss = Callable[[str], None]
Produce = Callable[[threading.Event, Miss], Iterator[Frame]]


class Source(Iterator[Frame]):
    """Frames made by a thread, to be gone through once. Use it in a `with`, or call `close()`, so that leaving early ends the thread.

    A file's frames come in order and complete; a live stream gives its latest frame and drops those that nobody asked for in time.
    What goes wrong in the thread is raised by the iteration.

    Attributes:
        live: a stream.
        missed: files, or ends of files, that could not be read so far; a warning named each.
    """

    def __init__(self, produce: Produce, live: bool = False) -> None:
        self.live = live
        self.missed = 0
        self._produce = produce
        self._stop = threading.Event()
        self._queue: queue.Queue[object] = queue.Queue(1 if live else _AHEAD)
        self._thread = threading.Thread(target=self._run, name="frame source", daemon=True)

    def __next__(self) -> Frame:
        if self._stop.is_set():
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, Frame):
            return item
        self.close()
        raise StopIteration if item is _END else item

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and free the file or device. May be called again."""
        self._stop.set()
        deadline = time.monotonic() + _CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._drop_one()  # a thread that waits for room goes on and sees the stop
            self._thread.join(0.02)

    def miss(self, what: str) -> None:
        """Tell of something that can't be read, while the rest goes on."""
        self.missed += 1
        warn(what)

    def _run(self) -> None:
        try:
            with contextlib.closing(self._produce(self._stop, self.miss)) as frames:
                for frame in frames:
                    self._put(frame)
                    if self._stop.is_set():
                        return
            self._put(_END)
        except BaseException as error:  # whatever it is, the consumer must hear of it and not wait for ever
            self._put(error)

    def _put(self, item: object) -> None:
        if self.live and self._queue.full():
            self._drop_one()
        self._queue.put(item)

    def _drop_one(self) -> None:
        with contextlib.suppress(queue.Empty):
            self._queue.get_nowait()


def open_source(text: str, vid_stride: int = 1) -> Source:
    """The source that `text` names. Nothing is read or connected to before the first frame is asked for.

    Args:
        text: an image or video file, a folder, a glob, a list file (.txt, one path a line, relative ones to the list's folder or the
            working folder, # for comments), a webcam's number or a stream's URL.
        vid_stride: of a video or stream, give every n-th frame.

    Raises:
        UserError: nothing is there, or nothing of it is an image or a video. While iterating: a video can't be read, no image can, or a
            stream can't be reached.
    """
    if vid_stride < 1:
        raise UserError(f"--vid-stride {vid_stride}: give 1 (every frame) or more")
    if text.isdecimal():
        return Source(lambda stop, _: _stream_frames(int(text), f"webcam {text}", vid_stride, stop), live=True)
    if is_url(text):
        try:
            suffix = Path(urlsplit(text).path).suffix.lower()
        except ValueError as error:
            raise UserError(f"{text}: no address: {error}") from None
        if suffix in IMAGE_SUFFIXES:
            raise UserError(f"{text}: a single image is not fetched from the network; download it and name the file")
        name = re.sub(r"//[^/]*@", "//", text)
        if suffix in VIDEO_SUFFIXES:
            return Source(lambda stop, miss: _far_video_frames(text, name, vid_stride, stop, miss))
        return Source(lambda stop, _: _stream_frames(text, name, vid_stride, stop), live=True)
    paths = _find_paths(text)
    return Source(lambda stop, miss: _file_frames(paths, text, vid_stride, stop, miss))


def is_url(text: str) -> bool:
    return text.partition("://")[0].lower() in STREAM_SCHEMES and "://" in text


def natural_key(path: Path) -> list[str | int]:
    """Sorts frame2 before frame10."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", str(path).lower()))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts


def _find_paths(text: str) -> list[Path]:
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return _readable([p for p in path.iterdir() if p.is_file()], text)
    if path.suffix.lower() == ".txt" and path.is_file():
        return _read_list(path)
    if path.is_file():
        if path.suffix.lower() == ".streams":
            raise UserError(f"{text}: one stream at a time: start a detect.py for each of its lines, with that line as --source")
        if not _is_readable(path):
            raise UserError(f"{text}: neither an image ({_words(IMAGE_SUFFIXES)}) nor a video ({_words(VIDEO_SUFFIXES)}) nor a list of them (.txt)")
        return [path]
    if glob.has_magic(text):
        return _readable([Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()], text)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{text}: no such image, video, folder or list{did_you_mean(path.name, beside)}")


def _is_readable(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _words(suffixes: frozenset[str]) -> str:
    return " ".join(sorted(suffixes))


def _readable(found: Sequence[Path], text: str) -> list[Path]:
    paths = sorted(filter(_is_readable, found), key=natural_key)
    if not paths:
        raise UserError(f"{text}: {len(found)} files there, none of them an image ({_words(IMAGE_SUFFIXES)}) or a video ({_words(VIDEO_SUFFIXES)})")
    return paths


def _read_list(path: Path) -> list[Path]:
    """The list's files in its own order."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as a list of files: {error}") from None
    paths = []
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if is_url(entry):
            raise UserError(f"{path}:{number}: {entry} is a stream, and streams are shown one at a time: start a detect.py with it as --source")
        if not _is_readable(Path(entry)):
            raise UserError(f"{path}:{number}: {entry} is neither an image ({_words(IMAGE_SUFFIXES)}) nor a video ({_words(VIDEO_SUFFIXES)})")
        named = Path(os.path.expanduser(entry))
        paths.append(beside if (beside := path.parent / named).exists() else named)
    if not paths:
        raise UserError(f"{path}: the list names no file; write one path a line")
    return paths


def _file_frames(paths: Sequence[Path], text: str, stride: int, stop: threading.Event, miss: Miss) -> Iterator[Frame]:
    given = 0
    for path in paths:
        try:
            if path.suffix.lower() in VIDEO_SUFFIXES:
                # Absolute, or FFmpeg takes what stands before a colon for a protocol.
                for frame in _video_frames(os.path.abspath(path), str(path), stride, stop, miss):
                    yield frame
                    given += 1
            else:
                yield Frame(str(path), 0, read_image(path), None)
                given += 1
        except ImageError as error:
            if len(paths) == 1:
                raise UserError(str(error)) from None
            miss(f"skipped {error}")
    if not given:
        raise UserError(f"{text}: none of its {len(paths)} files can be read")


def _far_video_frames(address: str, name: str, stride: int, stop: threading.Event, miss: Miss) -> Iterator[Frame]:
    try:
        yield from _video_frames(address, name, stride, stop, miss)
    except ImageError as error:
        raise UserError(str(error)) from None


def _video_frames(address: str, name: str, stride: int, stop: threading.Event, miss: Miss) -> Iterator[Frame]:
    count, place, lost, at_s, video = 0, 0, 0, 0.0, None
    if not is_text(address):
        raise ImageError(f"{name}: OpenCV reads no video whose name is not UTF-8: rename it")
    with _capture(address) as capture:
        for image, video, at, bad in _images(capture, stride, stop):
            place, lost, at_s = at, bad, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            yield Frame(name, count, image, video)
            count += 1
    if stop.is_set():
        return
    if not video:
        raise ImageError(f"{name}: can't be read as a video: it is missing, broken or of a kind that this OpenCV can't decode")
    if lost:
        miss(f"{name}: {lost} of its frames are damaged and left out")
    if place + stride < _NEARLY_ALL * video.frames and at_s < _NEARLY_ALL * video.frames / video.fps:
        miss(f"{name}: broken off after frame {place + 1} of {video.frames}, or trimmed without being encoded anew")


def _stream_frames(address: str | int, name: str, stride: int, stop: threading.Event) -> Iterator[Frame]:
    count, came, failures, reached, expected, began = 0, 0, 0, 0, 0, 0.0
    while not stop.is_set():
        with _capture(address) as capture:
            if not came and not capture.isOpened():
                raise UserError(f"{name}: can't be opened; check the address, the device and whether another program uses it")
            for image, video, place, _ in _images(capture, stride, stop):
                if failures:
                    info(f"{name}: reconnected")
                failures, came, reached, expected = 0, came + 1, place + stride, video.frames
                video = video._replace(frames=0, fps=video.fps if video.fps <= _FASTEST else _FALLBACK_FPS)
                began = began or time.monotonic()
                if not expected:  # a camera may give fewer frames than it declares, or none for a while: its video is to last as long as life
                    count = max(count, int((time.monotonic() - began) * video.fps / stride))
                yield Frame(name, count, image, video)
                count += 1
        if stop.is_set():
            return
        if reached >= _NEARLY_ALL * expected > 0:  # a file behind an address that does not say so
            return
        if failures == _RETRIES:
            raise UserError(f"{name}: dropped after {came} frames, and {_RETRIES} attempts to reconnect failed")
        wait_s = _BACKOFF_S * 2**failures
        failures += 1
        warn(f"{name}: dropped after {came} frames; reconnecting in {wait_s:g} s (attempt {failures} of {_RETRIES})")
        stop.wait(wait_s)


@contextlib.contextmanager
def _capture(address: str | int) -> Iterator[cv2.VideoCapture]:
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it reports each back end that it tried in vain; one line of ours is better
    try:
        capture = cv2.VideoCapture(address) if isinstance(address, int) else cv2.VideoCapture(address, cv2.CAP_ANY, timeouts)
    finally:
        cv2.utils.logging.setLogLevel(level)
    try:
        yield capture
    finally:
        capture.release()


def _images(capture: cv2.VideoCapture, stride: int, stop: threading.Event) -> Iterator[tuple[np.ndarray, VideoInfo, int, int]]:
    """Every stride-th image until the capture gives no more or is to stop, its place from 0, and how many frames before it were damaged.

    The size is the image's own: the container's ignores rotation.
    """
    fps, frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    fps = fps if 0 < fps <= 1000 else _FALLBACK_FPS
    frames = int(frames) if 0 < frames < 2**40 else 0
    place, due, lost, bad, alive = -1, 0, 0, 0, time.monotonic()
    while not stop.is_set() and bad <= _BAD_IN_A_ROW and (not bad or time.monotonic() - alive < _TIMEOUT_MS / 1000):
        there, image = capture.grab(), None
        if there and place + bad + 1 >= due:
            there, image = capture.retrieve()
        if not there:
            bad += 1
            continue
        place, lost, bad = place + bad + 1, lost + bad, 0
        if image is not None:
            due = place + stride
            yield image, VideoInfo(fps, frames, image.shape[1], image.shape[0]), place, lost
        alive = time.monotonic()
