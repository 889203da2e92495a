"""How OpenMP's threads wait, to be settled before PyTorch is imported: no torch here."""
from __future__ import annotations

import os


def wait_politely() -> None:
    """Let idle threads sleep instead of spin, unless the user's OMP_WAIT_POLICY says otherwise.

    Spinning threads take the cores from the loader's workers, and from whatever else runs: a forward pass beside two busy
    processes on 2 cores took 30 times as long (docs/results.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
