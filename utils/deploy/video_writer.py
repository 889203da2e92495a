"""An annotated video, encoded in its own thread."""
from __future__ import annotations

import contextlib
import queue
import threading
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import atomic_write, is_text

_WAITING = 4  # frames not yet encoded: enough to overlap with inference, little memory


class VideoWriter:
    """Writes frames to `path` (MPEG-4). The file appears, whole, at `close()`; leaving the `with` by an exception leaves no file.

    Args:
        path: usually .mp4.
        fps: frames a second.
        size: (width, height) of every frame.

    Raises:
        UserError: no video of that kind can be written there; in `close()`: not every frame reached the disk.
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int]) -> None:
        self.path = Path(path)
        self._size = size
        self._written = 0
        self._error: Exception | None = None
        self._file = contextlib.ExitStack()
        if not is_text(str(self.path)):
            raise UserError(f"{self.path}: OpenCV writes no video to a name that is not UTF-8: choose another --project")
        self._temporary = self._file.enter_context(atomic_write(self.path.absolute()))  # or FFmpeg takes what stands before a colon for a protocol
        fps = max(round(fps, 3 if fps < 65 else 2 if fps < 650 else 0), 0.001)  # MPEG-4 counts time in 1/65535 s at the finest
        self._encoder = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
        if not self._encoder.isOpened():
            self._discard()
            raise UserError(f"{self.path}: no {size[0]}x{size[1]} video can be written there; name an .mp4 file in a writable folder")
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="video writer", daemon=True)
        self._thread.start()

    def write(self, image: np.ndarray) -> None:
        """Take one (H, W, 3) uint8 BGR frame, which must not be changed afterwards. Waits while the encoder is behind."""
        if image.shape != (self._size[1], self._size[0], 3) or image.dtype != np.uint8:
            raise ValueError(f"{self.path}: a frame of {image.shape} {image.dtype} in a video of {self._size[0]}x{self._size[1]}")
        if self._error:
            raise self._error
        self._queue.put(image)
        self._written += 1

    def close(self) -> None:
        """Encode what waits and put the file in place; without a single frame there is none. May be called again."""
        if not self._thread.is_alive():
            return
        self._finish()
        if self._error or not self._written:
            self._discard()
            if self._error:
                raise self._error
            return
        capture = cv2.VideoCapture(str(self._temporary))  # OpenCV's encoder does not tell that the disk is full
        on_disk = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        if on_disk < self._written:
            self._discard()
            raise UserError(f"{self.path}: only {max(on_disk, 0)} of {self._written} frames could be written; is the disk full?")
        self._file.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
        elif self._thread.is_alive():
            self._finish()
            self._discard()

    def _run(self) -> None:
        while (image := self._queue.get()) is not None:
            try:
                self._encoder.write(image)
            except Exception as error:  # go on emptying the queue, so that write() never waits for ever
                self._error = error

    def _finish(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._encoder.release()

    def _discard(self) -> None:
        """Leave atomic_write by an exception: it removes the temporary file and keeps what was at `path` before."""
        abandoned = UserError("abandoned")
        self._file.__exit__(type(abandoned), abandoned, None)
