"""How OpenMP's threads wait, to be settled before PyTorch, or another library that brings OpenMP, is imported: no torch here."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_POLICY = "OMP_WAIT_POLICY"


def wait_politely() -> None:
    """Let idle threads sleep instead of spin, unless the user's OMP_WAIT_POLICY says otherwise.

    Spinning threads take the cores from the loader's workers, and from whatever else runs: a forward pass beside two busy
    processes on 2 cores took 30 times as long (docs/results.md).
    """
    os.environ.setdefault(_POLICY, "passive")


@contextmanager
def waiting_politely() -> Iterator[None]:
    """As `wait_politely`, for what is loaded within alone: the environment is afterwards as it was."""
    theirs = _POLICY in os.environ
    wait_politely()
    try:
        yield
    finally:
        if not theirs:
            os.environ.pop(_POLICY, None)
