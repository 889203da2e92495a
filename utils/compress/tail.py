"""Where a network ends and the decoding of its maps begins, in a graph of any runtime."""
from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Tail(NamedTuple):
    """Node names."""

    last: frozenset[str]  # weighted layers that no weighted layer follows: Detect's convolutions
    after: frozenset[str]  # nodes that no weighted layer follows and that are none: the decoding


def find_tail(sources: Mapping[str, Collection[str]], weighted: Collection[str]) -> Tail:
    """
    Args:
        sources: of each node, those that it reads from.
        weighted: convolutions and matrix products.
    """
    before = set()  # all that some weighted layer hangs on
    open_ends = [source for name in weighted for source in sources[name]]
    while open_ends:
        name = open_ends.pop()
        if name not in before:
            before.add(name)
            open_ends += sources[name]
    return Tail(frozenset(set(weighted) - before), frozenset(sources.keys() - before - set(weighted)))
