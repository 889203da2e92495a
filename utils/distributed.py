"""Several processes, as torchrun starts them: who am I, and what does the first one say."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
from torch import distributed, nn

from utils.errors import UserError

_PATIENCE = timedelta(hours=12)  # the other processes wait while the first one validates

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

    def gather(self, value: T) -> list[T]:
        """Each process's plain value, in every process."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def first_alone(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, the first before the others: they find the files that it leaves."""
        made = make() if self.rank == 0 else None
        self.share(None)
        return made if self.rank == 0 else make()

    def wrap(self, model: nn.Module, device: torch.device, sync_bn: bool = False) -> nn.Module:
        """Average gradients over the processes; buffers follow the first one.

        Args:
            sync_bn: batch norms see the images of all processes; they are exchanged in `model` itself, the parameters stay.

        Raises:
            UserError: sync_bn on a CPU, where PyTorch has none.
        """
        if self.size == 1:
            return model
        if sync_bn:
            if device.type != "cuda":
                raise UserError("--sync-bn needs CUDA devices: leave it out")
            if any(isinstance(module, nn.BatchNorm2d) and [*module.children()] for module in model.modules()):
                raise UserError("--sync-bn: this backbone's norms compute its activations too, which PyTorch's exchange would lose: leave it out")
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def averaging(network: nn.Module, now: bool) -> AbstractContextManager[None]:
    """For a forward and a backward pass: gradients are averaged over the processes in it, or stay in each until a later pass averages them all."""
    return nullcontext() if now or not isinstance(network, nn.parallel.DistributedDataParallel) else network.no_sync()


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join torchrun's group (nccl on CUDA, gloo on CPU) for the block; a single process has no group. What names no GPU then means this one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    yield World(distributed.get_rank(), size)
    distributed.destroy_process_group()  # not after an error: it would wait for processes that wait for this one, and torchrun would see no end
