"""Signals: the stack that a thread has for them, which OpenVINO does not leave alone, a Ctrl-C that must wait, and an end that is asked for."""
from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
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


class Terminated(KeyboardInterrupt):
    """SIGTERM, of which no child has heard, as they have of Ctrl-C."""


@contextmanager
def term_as_interrupt() -> Iterator[None]:
    """SIGTERM (`kill`, `docker stop`) is heard like Ctrl-C, so that what is being written ends well. Nothing changes where others handle it.

    Nor in torchrun's processes but the first: they write nothing, and one that waits for the others within PyTorch would not hear it.
    """
    is_handled = threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if is_handled or os.environ.get("RANK", "0") != "0":
        yield
        return
    process = os.getpid()

    def end(*_: object) -> None:
        if os.getpid() == process:
            raise Terminated
        os._exit(128 + signal.SIGTERM)  # a loader's worker, which has nothing to end well

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_thread(items: queue.Queue, done: threading.Event) -> None:
    """Put None, the end, behind a thread's items and wait until it is `done`; only then pass Ctrl-C on, or what it writes would be lost.

    Not `Thread.join`: interrupted, it takes a thread that runs for one that has stopped (Python 3.11).
    """
    asked, interrupted = False, None
    while not done.is_set():
        try:
            if not asked:
                items.put(None)
                asked = True
            done.wait()
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted:
        raise interrupted
