"""What those who run a network in PyTorch need of it, and how a CPU runs it fastest."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from utils.cpu import images_at_once
from utils.device import autocast


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


def to_arrays(decoded: Tensor, least: float) -> Sequence[np.ndarray]:
    """Decoded boxes (B, N, 5 + C) as an array for each image; only those whose objectness is above `least` leave a GPU."""
    images = [image[image[:, 4] > least] for image in decoded] if decoded.is_cuda else decoded
    return [image.float().numpy(force=True) for image in images]


class TorchRunner:
    """A network in PyTorch as a `Runner` (utils/runner.py).

    Args:
        network: ready for inference on `device`.
        dtype: of convolutions and matrix products.
    """

    def __init__(self, network: Network, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        self.network, self.device, self.dtype = network, torch.device(device), dtype

    def run(self, images: np.ndarray, least: float) -> Sequence[np.ndarray]:
        channels_last = torch.from_numpy(images).permute(0, 3, 1, 2)
        return to_arrays(infer(self.network, channels_last, self.device, self.dtype)[1], least)

    def threads(self) -> AbstractContextManager[tuple[ThreadPoolExecutor, int]]:
        return inference_threads(self.device)


@contextmanager
def inference_threads(device: torch.device) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that share a CPU's cores between images rather than within one, and their number.

    Two images on a core each finish sooner than one after the other on two cores: within one image the cores wait for each other after
    every layer, and a core that decodes or encodes meanwhile makes all of them late (docs/results.md). A GPU takes one batch at a time.
    """
    threads = torch.get_num_threads()
    workers = images_at_once(threads) if device.type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, "inference", initializer=torch.set_num_threads, initargs=(max(threads // workers, 1),))
    try:
        yield pool, workers
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
