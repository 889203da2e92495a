"""What a run tells its user: plain lines on stdout from the first process, warnings on stderr."""
from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

_laying_aside = threading.RLock()  # of two threads at once each would bring back what the other had put in its place


def is_main_process() -> bool:
    """True but in torchrun's second and later processes."""
    return int(os.environ.get("RANK", "0")) == 0


def info(text: str = "") -> None:
    if is_main_process():
        print(text, flush=True)


def warn(text: str) -> None:
    if is_main_process():
        print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Nothing that libraries log or warn of, up to errors: advice for their own users. One thread at a time, as it is of the whole program."""
    with _laying_aside:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)


@contextmanager
def no_output(descriptor: int) -> Iterator[None]:
    """Nothing on stdout (1) or stderr (2): what C libraries write past Python's own streams, and what others print."""
    with _laying_aside:
        stream, redirect = {1: (sys.stdout, redirect_stdout), 2: (sys.stderr, redirect_stderr)}[descriptor]
        if stream is None:  # closed, as in a service: whatever file has this number now is another's
            yield
            return
        stream.flush()
        kept = os.dup(descriptor)
        try:
            with open(os.devnull, "w") as nowhere, redirect(nowhere):
                os.dup2(nowhere.fileno(), descriptor)
                yield
        finally:
            stream.flush()
            with suppress(OSError, AttributeError, TypeError):  # no such library to be had: some lines may still show
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, descriptor)
            os.close(kept)
