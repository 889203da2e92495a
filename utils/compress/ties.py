"""Numbers that stand for the same thing."""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def representatives(count: int, ties: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(count,) the least of the numbers that are tied to each, directly or by others.

    Args:
        ties: pairs of equally long arrays; their numbers are tied place by place.
    """
    root = list(range(count))

    def find(n: int) -> int:
        while root[n] != n:
            root[n] = root[root[n]]
            n = root[n]
        return n

    for a, b in ties:
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            x, y = find(x), find(y)
            if x != y:
                root[max(x, y)] = min(x, y)
    return np.array([find(n) for n in range(count)])
