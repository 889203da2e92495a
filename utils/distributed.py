"""Several processes, as torchrun starts them: who am I, and what does the first one say."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import distributed, nn

T = TypeVar("T")


class World(NamedTuple):
    rank: int = 0
    size: int = 1

    def share(self, value: T) -> T:
        """The first process's plain value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Average gradients over the processes; buffers follow the first one."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join torchrun's group (nccl on CUDA, gloo on CPU) for the block; a single process has no group."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
