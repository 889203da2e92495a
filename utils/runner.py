"""What detection needs of a network, whatever library computes it: arrays in, arrays out. No torch here."""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np


class Runner(Protocol):
    """A network in place, ready for images; several threads may share it."""

    def run(self, images: np.ndarray, least: float) -> Sequence[np.ndarray]:
        """(B, H, W, 3) uint8 RGB -> of each image its boxes (n, 5 + C) float32: cx, cy, w, h in pixels, objectness, class probabilities.

        Those whose objectness is not above `least` may be missing: no confidence exceeds it.
        """
        ...

    def threads(self) -> AbstractContextManager[tuple[ThreadPoolExecutor, int]]:
        """The threads to call it from, and how many they are."""
        ...
