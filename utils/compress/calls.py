"""A call of a PyTorch function, and what is asked of its arguments."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """A call of a function of PyTorch in which channels are involved."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor]  # tensors with numbers
    made: list[Tensor]


def tensors_of(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)


def replaced(tree: Any, numbers: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return numbers(tree)
    if isinstance(tree, dict):
        return {key: replaced(value, numbers) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(replaced(value, numbers) for value in tree)
    return tree


def arguments(call: Call, names: Sequence[str], defaults: Sequence[Any]) -> tuple[Any, ...]:
    """The call's arguments in the order of `names`; the last ones have defaults."""
    values = dict(zip(names[-len(defaults) :], defaults, strict=True)) | dict(zip(names, call.args, strict=False)) | call.kwargs
    return tuple(values[name] for name in names)


def along_channels(channels: Tensor, like: Tensor) -> Tensor:
    """(C,) -> the shape of `like` (B, C, …)."""
    return channels.view(1, -1, *[1] * (like.dim() - 2)).expand(like.shape)


def same_lines(numbers: Tensor, made: list[Tensor]) -> bool:
    """Whether the channels (dimension 1, or the last of tokens) are one dimension of each result, all there and in order."""
    def lines(tensor: Tensor) -> list[Tensor]:
        return [tensor.movedim(dim, 0).flatten(1)[:, 0] for dim in range(tensor.dim()) if tensor.numel()]

    before = [line for line in lines(numbers) if len(line) > 1 and bool((line != line[0]).any())]
    return not before or any(all(any(torch.equal(line, other) for other in lines(own)) for own in made) for line in before)
