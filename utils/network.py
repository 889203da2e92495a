"""What those who run a network need of it, and how a CPU runs it fastest."""
from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.device import autocast

_MAX_WORKERS = 4  # each holds its own activations


class Network(Protocol):
    """A model ready for inference: raw outputs, and their decoding to (B, N, 5 + C) boxes, objectness and class probabilities."""

    def __call__(self, images: Tensor) -> Any: ...

    def decode(self, outputs: Any) -> Tensor: ...


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images (B, 3, H, W) to float 0..1 on the device, their memory layout kept."""
    return images.to(device, non_blocking=True).float().div_(255)


@torch.inference_mode()
def infer(network: Network, images: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """uint8 images to the network's raw outputs and its decoded boxes, done when it returns."""
    with autocast(device, dtype):
        outputs = network(to_input(images, device))
    decoded = network.decode(outputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # else a clock would stop before the work does
    return outputs, decoded


def images_at_once(device: torch.device) -> int:
    """Threads of `inference_threads`, each with an image of its own."""
    return min(torch.get_num_threads(), _MAX_WORKERS) if device.type == "cpu" else 1


@contextmanager
def inference_threads(device: torch.device) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that share a CPU's cores between images rather than within one, and their number.

    Two images on a core each finish sooner than one after the other on two cores: within one image the cores wait for each other after
    every layer, and a core that decodes or encodes meanwhile makes all of them late (docs/results.md). A GPU takes one batch at a time.
    """
    threads, workers = torch.get_num_threads(), images_at_once(device)
    pool = ThreadPoolExecutor(workers, "inference", initializer=torch.set_num_threads, initargs=(max(threads // workers, 1),))
    try:
        yield pool, workers
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
