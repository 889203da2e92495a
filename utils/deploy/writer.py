"""What detect writes: annotated images and videos, text labels, crops and a table, by a thread that overlaps with inference."""
from __future__ import annotations

import contextlib
import csv
import functools
import math
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.data.sources import Frame
from utils.deploy.results import DEFAULT_STYLE, Result, Style
from utils.deploy.video_writer import VideoWriter
from utils.draw import save_image
from utils.evaluate.output import save_labels
from utils.files import atomic_write
from utils.signals import end_thread

_WAITING = 2  # results not yet drawn: enough to overlap with inference, little memory
_WRITABLE = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})  # other images are written as .jpg
_LONGEST_GAP_S = 10  # that a live video is held still for
_LONGEST_NAME = 100  # characters, of an address
_COLUMNS = ("image", "frame", "class", "name", "confidence", "x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class Outputs:
    """What is written for each image."""

    images: bool = True  # annotated images and videos
    txt: bool = False  # labels/NAME.txt, of a video's frame labels/NAME_1.txt and so on
    txt_conf: bool = False
    csv: bool = False  # predictions.csv
    crops: bool = False  # crops/CLASS/NAME.jpg, then NAME2.jpg and so on
    style: Style = DEFAULT_STYLE
    vid_stride: int = 1  # one in so many of a video's frames comes: with as many times fewer a second the written one lasts as long

    @property
    def any(self) -> bool:
        return self.images or self.txt or self.csv or self.crops


class ResultWriter:
    """Writes results in the order they are put in. Use it in a `with`.

    A video's file appears when its last frame is written; leaving by an exception leaves no half-written file. What goes wrong in the thread is
    raised by `put` or `close`.

    Args:
        make_folder: gives the folder; called once, for the first result that is to be written, so that a run without one leaves no folder.
    """

    def __init__(self, make_folder: Callable[[], Path], outputs: Outputs) -> None:
        self.folder: Path | None = None
        self.busy_s = 0.0  # time spent drawing and writing
        self._make_folder = make_folder
        self.outputs = outputs
        self._stems = _Stems()
        self._video: VideoWriter | None = None
        self._video_of: tuple[str, tuple[int, int]] | None = None
        self._last_index = -1  # of the frame that the video shows
        self._error: BaseException | None = None
        self._abandoned = False
        self._queue: queue.Queue[tuple[Frame, Result] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="result writer", daemon=True)
        self._done = threading.Event()

    def put(self, frame: Frame, result: Result) -> None:
        """Take one result. Waits while the thread is behind."""
        if not self.outputs.any:
            return
        if self.folder is None:
            self.folder = self._make_folder()
            self._thread.start()
        if self._error:
            raise self._error
        self._queue.put((frame, result))

    def close(self) -> None:
        """Write what waits. May be called again."""
        if self._thread.ident is not None and not self._done.is_set():
            end_thread(self._queue, self._done)
        if self._error:
            raise self._error

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abandoned = True
            with contextlib.suppress(BaseException):  # the exception that is under way says what went wrong
                self.close()

    def _run(self) -> None:
        items = iter(self._queue.get, None)
        try:
            with contextlib.ExitStack() as files:
                files.push(self._end_video)
                table = self._open_table(files) if self.outputs.csv else None
                for frame, result in items:
                    if self._abandoned:
                        break
                    start = time.perf_counter()
                    self._write(frame, result, table)
                    self.busy_s += time.perf_counter() - start
                if self._abandoned:
                    raise InterruptedError("abandoned")  # the open files are thrown away
        except BaseException as error:
            self._error = error
        for _ in items:  # so that put() never waits for ever
            pass
        self._done.set()

    def _write(self, frame: Frame, result: Result, table: csv.writer | None) -> None:
        out, stem = self.outputs, self._stems.of(frame.path, frame.video is not None)
        name = stem if frame.video is None else f"{stem}_{frame.index + 1}"
        if out.images:
            self._write_picture(frame, result.plot(*out.style), stem)
        if out.txt:
            save_labels(self.folder / "labels", name, result.found, np.array(result.size), out.txt_conf)
        if out.crops:
            save_crops(self.folder / "crops", name, result)
        if table is not None:
            number = "" if frame.video is None else frame.index + 1
            for cls, conf, box in zip(result.found.cls, result.found.conf, result.found.xyxy, strict=True):
                table.writerow((frame.path, number, cls, result.names[cls], f"{conf:.6g}", *(f"{v:.6g}" for v in box)))

    def _write_picture(self, frame: Frame, image: np.ndarray, stem: str) -> None:
        size = image.shape[1], image.shape[0]
        if frame.index == 0 or self._video_of != (frame.path, size):
            self._end_video()
        if frame.video is None:
            suffix = Path(frame.path).suffix
            save_image(self.folder / f"{stem}{suffix if suffix.lower() in _WRITABLE else '.jpg'}", image)
            return
        if self._video is None:
            path = self.folder / f"{stem}.mp4"
            if frame.index:  # a stream that came back in another size
                path = path.with_stem(f"{stem}_from_{frame.index + 1}")
            self._video = VideoWriter(path, frame.video.fps / self.outputs.vid_stride, size)
            self._video_of, self._last_index = (frame.path, size), frame.index - 1
        # A live source drops what nobody took in time: each frame stays as long as it was the latest, so that the video lasts as long as life did.
        for _ in range(min(frame.index - self._last_index, math.ceil(_LONGEST_GAP_S * frame.video.fps))):
            self._video.write(image)
        self._last_index = frame.index

    def _end_video(self, *exception: object) -> None:
        video, self._video, self._video_of = self._video, None, None
        if video is not None:
            video.__exit__(*(exception or (None, None, None)))

    def _open_table(self, files: contextlib.ExitStack) -> csv.writer:
        temporary = files.enter_context(atomic_write(self.folder / "predictions.csv"))
        file = files.enter_context(open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape"))  # noqa: SIM115  (the stack closes it)
        table = csv.writer(file)
        table.writerow(_COLUMNS)
        return table


def save_crops(folder: Path, name: str, result: Result) -> None:
    """folder/CLASS/name.jpg for each box, then name2.jpg, name3.jpg…; a file that exists is left alone."""
    next_number: dict[Path, int] = {}
    folders = _class_folders(tuple(result.names))
    for cls, crop in zip(result.found.cls, result.crop(), strict=True):
        place = folder / folders[cls]
        place.mkdir(parents=True, exist_ok=True)
        number = next_number.get(place, 1)
        pixels = cv2.imencode(".jpg", crop)[1].tobytes()
        while not _write_new(place / f"{name}{number if number > 1 else ''}.jpg", pixels):
            number += 1
        next_number[place] = number + 1


def _write_new(path: Path, content: bytes) -> bool:
    """Unless it exists; others may write into the same folder. Not atomic_write: waiting for the disk would cost more than all else."""
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def file_name(text: str) -> str:
    """`text` as one part of a path: a class or a stream may be called anything."""
    return re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]+', "_", text).strip(" .") or "_"


@functools.lru_cache(16)
def _class_folders(names: tuple[str, ...]) -> list[str]:
    """Each its own, on disks too that don't tell capitals."""
    folders = [file_name(name) for name in names]
    count = Counter(map(str.casefold, folders))
    return [folder if count[folder.casefold()] == 1 else f"{folder}_{n}" for n, folder in enumerate(folders)]


class _Stems:
    """A file name for each source, without suffix, a file's own where it can be; of two sources of one name the second gets a number.

    A video's frames are numbered behind its name, so that no image may be called like one of them.
    """

    def __init__(self) -> None:
        self._of: dict[str, str] = {}
        self._taken: set[str] = set()
        self._videos: set[str] = set()

    def of(self, path: str, is_video: bool = False) -> str:
        if path not in self._of:
            base = Path(path).stem if "://" not in path else file_name(path.partition("?")[0])[:_LONGEST_NAME]
            stem, n = base, 1
            mark = "-" if not is_video and base.casefold() in self._videos else "_"
            while self._meets(stem.casefold(), is_video):
                n += 1
                stem = f"{base}{mark}{n}"
            self._taken.add(stem.casefold())
            if is_video:
                self._videos.add(stem.casefold())
            self._of[path] = stem
        return self._of[path]

    def _meets(self, stem: str, is_video: bool) -> bool:
        if is_video:
            return stem in self._taken or any(name.startswith(f"{stem}_") and name[len(stem) + 1 :].isdecimal() for name in self._taken)
        head, _, number = stem.rpartition("_")
        return stem in self._taken or (number.isdecimal() and head in self._videos)
