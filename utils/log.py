"""What a run tells its user: plain lines on stdout from the first process, warnings on stderr."""
from __future__ import annotations

import os
import sys


def is_main_process() -> bool:
    """True but in torchrun's second and later processes."""
    return int(os.environ.get("RANK", "0")) == 0


def info(text: str = "") -> None:
    if is_main_process():
        print(text, flush=True)


def warn(text: str) -> None:
    if is_main_process():
        print(f"warning: {text}", file=sys.stderr, flush=True)
