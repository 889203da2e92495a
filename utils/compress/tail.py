"""Parts of a graph of any runtime: where a network ends and the decoding of its maps begins, what belongs to a layer, what SiLU reads."""
from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import NamedTuple, TypeVar

Node = TypeVar("Node", bound=Hashable)


class Tail(NamedTuple):
    """Nodes, as the graph calls them."""

    last: frozenset  # weighted layers that no weighted layer follows: Detect's convolutions
    after: frozenset  # nodes that no weighted layer follows and that are none: the decoding


def find_tail(sources: Mapping[Node, Collection[Node]], weighted: Collection[Node]) -> Tail:
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


def with_activation(layer: Node, sources: Mapping[Node, Collection[Node]], functions: Collection[Node]) -> set[Node]:
    """The node and what depends on nothing but it and constants: its activation function.

    Args:
        sources: as of `find_tail`, in an order of computation.
        functions: nodes that may belong to one.
    """
    unit = {layer}
    for node, read in sources.items():
        if node in functions and read and unit.issuperset(read):
            unit.add(node)
    return unit


def silu_inputs(sources: Mapping[Node, Collection[Node]], sigmoids: Collection[Node], products: Collection[Node]) -> set[Node]:
    """The nodes x whose only readers are a sigmoid and the product of it and x.

    Args:
        sources: as of `find_tail`.
    """
    readers: dict[Node, list[Node]] = {}
    for node, read in sources.items():
        for source in read:
            readers.setdefault(source, []).append(node)
    found = set()
    for x, some in readers.items():
        sigmoid = next((node for node in some if node in sigmoids), None)
        others = [node for node in some if node != sigmoid]
        if sigmoid is not None and len(others) == 1 and others[0] in products and sigmoid in sources[others[0]]:
            found.add(x)
    return found
