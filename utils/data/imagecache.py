"""Decoded images at training size in one shared block of memory or disk: filled as they are first read, never copied for a worker."""
from __future__ import annotations

import mmap
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from utils.cpu import free_memory_bytes
from utils.errors import UserError

CacheMode = Literal["auto", "ram", "disk", "none"]


class ImageCache:
    """Slots for (H, W, 3) uint8 images of known sizes.

    Loader workers are forked, so that they share the block with their parent; where there is no fork, nothing is kept.
    Two that fill one slot at a time write the same bytes.
    """

    def __init__(self, sizes: np.ndarray, mode: CacheMode, limit_bytes: int, folder: Path | None = None) -> None:
        """
        Args:
            sizes: (N, 2) width, height of each image as it will be stored.
            mode: auto takes as many images as the limit allows; ram and disk take all.
            limit_bytes: of memory (`memory_limit`).
            folder: of the disk file; the system's temporary folder if None.

        Raises:
            UserError: ram is asked for, and all images take more than the limit.
        """
        if "fork" not in multiprocessing.get_all_start_methods():
            mode = "none"  # a worker that is not forked would get a copy of its own
        self._sizes = sizes
        lengths = sizes.astype(np.int64).prod(1) * 3
        ends = lengths.cumsum()
        self.capacity = 0 if mode == "none" else int((ends <= limit_bytes).sum()) if mode == "auto" else len(sizes)
        self._starts = ends - lengths
        total = int(ends[self.capacity - 1]) if self.capacity else 0
        if mode == "ram" and limit_bytes < total:
            raise UserError(f"--cache ram: the images take {total / 2**30:.1f} GB, {limit_bytes / 2**30:.1f} GB are free for them: "
                            "use --cache auto or disk")
        self._filled = np.frombuffer(mmap.mmap(-1, max(self.capacity, 1)), np.uint8)
        self._pixels = _block(total, on_disk=mode == "disk", folder=folder)

    @property
    def bytes(self) -> int:
        return self._pixels.nbytes

    def get(self, index: int, read: Callable[[], np.ndarray]) -> np.ndarray:
        """The stored image (don't write to it), or `read()`, stored if there is a slot for it."""
        if index >= self.capacity:
            return read()
        width, height = self._sizes[index]
        start = self._starts[index]
        slot = self._pixels[start : start + int(width) * int(height) * 3].reshape(height, width, 3)
        if not self._filled[index]:
            slot[:] = read()
            self._filled[index] = 1
        return slot


def memory_limit(mode: CacheMode, processes: int, taken: int = 0) -> int:
    """Bytes that the caches of one of so many processes may take together: half of what is free with auto, else all of it.

    Args:
        taken: of each process's share, by what is yet to begin.
    """
    free = free_memory_bytes() // processes
    if not free:  # the system does not tell
        return 0 if mode == "auto" else sys.maxsize
    return max(free - taken, 0) // (2 if mode == "auto" else 1)


def _block(size: int, on_disk: bool, folder: Path | None) -> np.ndarray:
    if not on_disk:
        return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
    with tempfile.TemporaryFile(dir=folder) as file:  # has no name: gone with the last process that maps it
        file.truncate(max(size, 1))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk is an error here; later, writing through the map, it would kill
        return np.frombuffer(mmap.mmap(file.fileno(), max(size, 1)), np.uint8)
