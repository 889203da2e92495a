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


_ENDS = (signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGTERM,)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, of which no child has heard, as they have of Ctrl-C."""


@contextmanager
def term_as_interrupt() -> Iterator[None]:
    """SIGTERM (`kill`, `docker stop`) and SIGHUP (a terminal or connection that ends) are heard like Ctrl-C, so that what is being written ends well.
    Nothing changes where others handle them.

    Nor in torchrun's processes but the first: they write nothing, and one that waits for the others within PyTorch would not hear it.
    """
    if threading.current_thread() is not threading.main_thread() or os.environ.get("RANK", "0") != "0":
        yield
        return
    free = [number for number in _ENDS if signal.getsignal(number) is signal.SIG_DFL]
    process = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() == process:
            raise Terminated
        os._exit(128 + number)  # a loader's worker, which has nothing to end well

    for number in free:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)


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
