"""How much memory a training batch takes: measured on a few images, before the run starts."""
from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.cpu import free_memory_bytes
from utils.device import autocast
from utils.distributed import World
from utils.errors import UserError
from utils.log import info, warn

_USABLE = 0.85  # of the free memory
_OVERHEAD = 1.35  # gradients and workspace that live beside the saved activations; of trainings of this family on a CPU
_LARGEST = 512
_PROBE_PX = 256  # the strides of any head up to P8 divide it


class Fit(NamedTuple):
    """A batch that fits."""

    batch_size: int  # over all processes
    host_bytes: int  # of the machine's own memory that a step of it takes in each


class StepMemory(NamedTuple):
    """What autograd keeps for a backward pass, in bytes."""

    once: int  # however many images there are: copies of the weights, as autocast's or rounded ones
    image: int  # for each, with an allowance for what lives beside it


def step_memory(model: nn.Module, imgsz: int, device: torch.device, dtype: torch.dtype = torch.float32) -> StepMemory:
    """Measured on two images of that size (norms want two), and on two and three small ones for what doesn't grow with images.

    The model is left as it was.
    """
    probe = copy.deepcopy(model).train()
    own = {p.untyped_storage().data_ptr() for p in probe.parameters()}

    def kept_bytes(count: int, side: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        images = torch.full((count, 3, side, side), 0.5, device=device).contiguous(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, dtype):
            outputs = probe(images)
        maps = sum(o.numel() * o.element_size() for o in outputs)
        return sum(nbytes for pointer, nbytes in kept.items() if pointer not in own) + maps

    small = min(imgsz, _PROBE_PX)
    two = kept_bytes(2, small)
    once = max(3 * two - 2 * kept_bytes(3, small), 0)
    two = two if small == imgsz else kept_bytes(2, imgsz)
    return StepMemory(once, max(int((two - once) / 2 * _OVERHEAD), 1))


def fit_batch(
    model: nn.Module, batch_size: int, imgsz: int, device: torch.device, world: World, images: int, dtype: torch.dtype = torch.float32
) -> Fit:
    """`batch_size` (over all processes), or for -1 the largest that fits in memory, at most the set's own number of images.

    Args:
        dtype: that convolutions will run in.

    Raises:
        UserError: in every process: the batch does not fit into one's memory, or can't be shared out evenly; the line says which would.
    """
    if batch_size != -1 and batch_size % world.size:
        raise UserError(f"--batch-size {batch_size} counts the images of all {world.size} processes: use a multiple of {world.size}")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes() // world.size
    once, each = step_memory(model, imgsz, device, dtype)
    state = once + 4 * sum(p.numel() * p.element_size() for p in model.parameters())  # gradients, momentum, average, and a copy on saving
    counts = (int((free * _USABLE - state) / each), int((free - state) / each * _OVERHEAD)) if free else (_LARGEST, _LARGEST)
    fits, may_fit = (max(min(of_all), 0) * world.size for of_all in zip(*world.gather(counts), strict=True))
    if batch_size == -1:
        batch_size = max(min(fits, _LARGEST, images) // world.size, 1) * world.size
        info(f"--batch-size -1: {batch_size} images of {each / 2**20:.0f} MB each, {free / 2**30:.1f} GB free")
    if batch_size > fits:
        told = (f"--batch-size {batch_size} at {imgsz} px needs about {(batch_size * each / world.size + state) / 2**30:.1f} GB a process, "
                f"{free / 2**30:.1f} GB are free: use --batch-size {max(fits, 1)} or less, or a smaller --imgsz")
        if device.type == "cpu" or batch_size > may_fit:
            raise UserError(told)
        warn(f"{told}, if it runs out of memory")  # a GPU says so in time; the allowance was measured on a CPU
    return Fit(batch_size, batch_size // world.size * each + state if device.type == "cpu" else 0)
