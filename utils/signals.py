"""The thread's own signal stack, which OpenVINO does not leave alone."""
from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """Linux's stack_t."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("bytes", ctypes.c_size_t))


@contextmanager
def keep_signal_stack() -> Iterator[None]:
    """Give the thread back, at the end of the block, the signal stack that it had before.

    Each time OpenVINO loads its CPU plugin it gives the calling thread a stack of its own. Of two that lived at once the second, when it goes,
    brings back the first one's, which may be freed by then: the next signal, such as the end of a loader's worker, kills the process. Where its stack
    is not the one in use, it touches nothing.
    """
    if sys.platform != "linux":
        yield
        return
    sigaltstack, before = ctypes.CDLL(None).sigaltstack, _Stack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)
