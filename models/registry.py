"""Block name in YAML -> class, with its channel rule and repeat rule registered beside the class."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from utils.errors import UserError
from utils.files import did_you_mean

Width = int | tuple[int, ...]  # channels of a row's output; a tuple for a row that makes several levels


class Wiring(NamedTuple):
    """What a channel rule answers: the constructor's arguments and the block's output channels."""

    args: list[Any]
    out_channels: Width | None  # None: the module tells them once it is built, as its `out_channels`


Scale = Callable[[Any], int]  # YAML width -> built width; raises ValueError for what is no positive whole number
ChannelRule = Callable[[Sequence[Any], list[Any], Scale], Wiring]  # the inputs' widths: ints, and tuples of them where a block takes levels


@dataclass(frozen=True)
class Block:
    name: str
    cls: type
    channels: ChannelRule
    repeats: Literal["outside", "inside"]  # the YAML's number: copies in a Sequential, or the constructor's third argument
    takes_levels: bool  # its input may be a row that makes several levels
    foreign: bool  # another library's network: its batch norms' constants and its activations are its own


_BLOCKS: dict[str, Block] = {}


def register(
    name: str, *, channels: ChannelRule, repeats: Literal["outside", "inside"] = "outside", takes_levels: bool = False, foreign: bool = False
) -> Callable[[type], type]:
    """Class decorator: make a block usable in YAML under `name`.

    Args:
        channels: `rule(in_channels, yaml_args, scale) -> Wiring`; see the rules below.
        repeats: "inside" passes the depth-scaled number as the constructor's third argument (after c1, c2).
        takes_levels: `channels` may be given a tuple of widths, and the module a tuple of maps, for a row that makes several levels.
        foreign: the family's batch-norm constants and the YAML's activation are not for it.

    Raises:
        ValueError: the name is taken by another class.
    """

    def add(cls: type) -> type:
        known = _BLOCKS.get(name)
        if known and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"block {name} is registered already, by {known.cls.__module__}")
        _BLOCKS[name] = Block(name, cls, channels, repeats, takes_levels, foreign)
        return cls

    return add


def find_block(name: str) -> Block:
    """The block of that YAML name.

    Raises:
        UserError: no such block; the line gives the nearest names.
    """
    try:
        return _BLOCKS[name]
    except (KeyError, TypeError):
        raise UserError(f"unknown module {name}{did_you_mean(name, _BLOCKS)} (your own blocks: --plugin my_blocks.py)") from None


def block_names() -> list[str]:
    return sorted(_BLOCKS)


# Channel rules. Each takes the input channels, the YAML's args and `scale`, and raises ValueError in words for a mismatch.


def one_input(inputs: Sequence[int]) -> int:
    if len(inputs) != 1:
        raise ValueError(f"takes one input, 'from' names {len(inputs)}")
    return inputs[0]


def to_width(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    """`[c2, …]` -> `cls(c1, scaled c2, …)`: convolutions and everything built of them."""
    if not args:
        raise ValueError("needs its output channels as first argument")
    c2 = scale(args[0])
    return Wiring([one_input(inputs), c2, *args[1:]], c2)


def keep_width(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    """`[…]` -> `cls(…)`, channels unchanged: pooling, upsampling, activations."""
    return Wiring(args, one_input(inputs))


def over_width(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    """`[…]` -> `cls(c1, …)`, channels unchanged: normalisation, squeeze-and-excitation."""
    return Wiring([one_input(inputs), *args], one_input(inputs))


def sum_widths(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    """Concatenation along channels."""
    if len(inputs) < 2:
        raise ValueError("joins several inputs: 'from' must be a list of rows, such as [-1, 6]")
    return Wiring(args, sum(inputs))


def equal_widths(inputs: Sequence[int], args: list[Any], scale: Scale) -> Wiring:
    """Element-wise sum of two inputs of one width."""
    if len(inputs) != 2:
        raise ValueError(f"adds two inputs, 'from' names {len(inputs)}; it must be a list of rows, such as [-1, 6]")
    if len(set(inputs)) != 1:
        raise ValueError(f"adds inputs of {' and '.join(map(str, inputs))} channels; give them one width (a 1x1 Conv before it)")
    return Wiring(args, inputs[0])
