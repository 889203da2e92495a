"""What the mobile families' bottlenecks share: the channel rules of their papers' rows, and the check of a row's numbers."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.layers import round_to_4
from models.registry import Scale, Wiring, one_input, to_width


def check_bneck(k: int, s: int, se: float = 0.0) -> None:
    """Refuse what a bottleneck can't be built with.

    Raises:
        ValueError: an even kernel, a stride other than 1 and 2, or a squeeze-and-excitation ratio outside 0..1.
    """
    if type(k) is not int or k < 1 or k % 2 == 0:
        raise ValueError(f"its kernel is an odd whole number, not {k!r}")
    if type(s) is not int or s not in (1, 2):
        raise ValueError(f"its stride is 1 or 2, not {s!r}")
    if not isinstance(se, int | float) or not 0 <= se <= 1:
        raise ValueError(f"its squeeze-and-excitation ratio is between 0 (none) and 1, not {se!r}")


def bneck(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    """`[c2, kernel, expansion channels, …]` -> `cls(c1, scaled c2, kernel, scaled expansion, …)`."""
    if len(args) < 3:
        raise ValueError("needs [output channels, kernel, expansion channels, …]")
    c2 = scale(args[0])
    return Wiring([one_input(inputs), c2, args[1], scale(args[2]), *args[3:]], c2)


def bneck_of_4(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    return bneck(inputs, args, lambda width: _scale_to_4(width, scale))


def to_width_of_4(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    return to_width(inputs, args, lambda width: _scale_to_4(width, scale))


def _scale_to_4(width: Any, scale: Scale) -> int:
    """GhostNet's own rounding: `scale` rounds up to multiples of 8, which would widen most of its stages at 0.5x and 1.3x."""
    scale(width)  # refuses what is no width
    fine = 1 << 16  # scale(fine * width) / fine is the unrounded product to 8 / fine channels
    return round_to_4(round(scale(width * fine) / fine, 2))
