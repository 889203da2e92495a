"""The training loop: forward, loss, backward, step, average; an epoch on one screen."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from utils.data.dataset import Batch
from utils.device import autocast, peak_memory_bytes
from utils.distributed import averaging
from utils.errors import UserError
from utils.log import is_main_process
from utils.network import to_input
from utils.training.loss import Loss
from utils.training.schedule import StepSettings
from utils.training.stepper import Stepper


class Batches(Protocol):
    """A loader, or a list."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Criterion(Protocol):
    """What the network gives for a batch, and the batch's targets, to a loss whose parts have these names."""

    names: tuple[str, ...]

    def __call__(self, outputs: Any, targets: Tensor) -> Loss: ...


class EpochResult(NamedTuple):
    loss: np.ndarray  # means of the criterion's parts
    steps: int
    settings: StepSettings  # of the last batch
    images_per_second: float


def train_epoch(
    network: nn.Module,
    batches: Batches,
    criterion: Criterion,
    stepper: Stepper,
    settings: Callable[[int], StepSettings],
    resize: Callable[[int, Tensor], Tensor],
    title: str,
    world: int = 1,
) -> EpochResult:
    """One pass over the batches.

    Args:
        network: in train mode; perhaps wrapped for several processes.
        settings: of the n-th batch of this epoch.
        resize: of the n-th batch's images: (n, (B, 3, H, W) 0..1) -> the like (--multi-scale).
        title: for the progress bar.
        world: processes; gradients are averaged over them, so that each one's loss counts `world` times to keep the batch's sum.

    Raises:
        UserError: the loss is no longer finite; its parts are named.
    """
    device, dtype = stepper.device, stepper.dtype
    total, seen, start = np.zeros(len(criterion.names)), 0, time.perf_counter()
    bar = tqdm(batches, desc=title, dynamic_ncols=True, disable=not is_main_process(), leave=True)
    for n, batch in enumerate(bar):
        images, step = resize(n, to_input(batch.images, device)), settings(n)
        with averaging(network, now=stepper.moves_next(step) or n + 1 == len(batches)):
            with autocast(device, dtype), _enough_for_norms(images):
                outputs = network(images)
            loss = criterion(outputs, batch.targets.to(device, non_blocking=True))
            stepper.backward(loss.total * world, step, len(images) * world)
        total += _finite_parts(loss, criterion.names, n)  # only now: reading them waits for a GPU
        seen += len(images) * world
        rate = seen / (time.perf_counter() - start)
        means = " ".join(f"{name} {value:.4f}" for name, value in zip(criterion.names, total / (n + 1), strict=True))
        bar.set_postfix_str(f"{means} {rate:.0f} img/s {peak_memory_bytes(device) / 2**30:.2f} GB", refresh=False)
    stepper.step()  # what is gathered belongs to this epoch: the next one starts clean, here or in a resumed run
    return EpochResult(total / (n + 1), n + 1, step, rate)


@contextmanager
def _enough_for_norms(images: Tensor) -> Iterator[None]:
    """PyTorch's batch norm refuses a single value a channel: one image, at the coarsest map one pixel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        size = f"{images.shape[3]}x{images.shape[2]} px"
        raise UserError(f"batch norm needs more than {len(images)} image of {size} in a batch: give a larger --imgsz, or a --batch-size that leaves "
                        "no single image over") from error


def _finite_parts(loss: Loss, names: tuple[str, ...], n: int) -> np.ndarray:
    parts = loss.parts.cpu().numpy().astype(np.float64)
    if not np.isfinite(parts).all():
        named = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, parts, strict=True))
        raise UserError(f"the loss is not finite at batch {n} of this epoch ({named}): lower lr0 in --hyp, or try --precision fp32; "
                        "last.pt holds the epoch before, if there was one")
    return parts


def random_resize(imgsz: int, stride: int, seed: int, epoch: int) -> Callable[[int, Tensor], Tensor]:
    """--multi-scale: the n-th batch at 0.5 to 1.5 times `imgsz`, in whole strides, the same in every process."""

    def resize(n: int, images: Tensor) -> Tensor:
        size = np.random.default_rng((seed, epoch, n, 1)).integers(imgsz // 2, imgsz * 3 // 2 + stride) // stride * stride
        scale = max(int(size), stride) / max(images.shape[2:])
        height, width = (max(round(side * scale / stride), 1) * stride for side in images.shape[2:])
        return F.interpolate(images, (height, width), mode="bilinear", align_corners=False)

    return resize


def same_size(n: int, images: Tensor) -> Tensor:
    return images
