"""How much memory a network needs at once, counted from its tensors: the same on every machine and in every process."""
from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@torch.no_grad()
def peak_bytes(network: nn.Module, images: Tensor) -> int:
    """Weights, and the most that lives at once while these images run through eager PyTorch; scratch space inside an operator is not seen."""
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*network.parameters(), *network.buffers())}
    with _Living() as living:
        network(images)
    return sum(weights.values()) + images.untyped_storage().nbytes() + living.peak


class _Living(TorchDispatchMode):
    """Bytes of the storages that operators make, from their making to the end of the last tensor that uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._users: Counter[int] = Counter()  # by the storage's address

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                self._add(tensor, given)
        return result

    def _add(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in given and not self._users[address]:
            return  # a view of an input or a weight
        if not self._users[address]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[address] += 1
        weakref.finalize(tensor, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            self.now -= size
