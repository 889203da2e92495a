"""Which samples make up which batch, and the processes that prepare them."""
from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from types import TracebackType

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.data.dataset import Key, collate


class EpochBatches(Sampler[list[Key]]):
    """Batches of (epoch, index), in an order that depends on the seed and the epoch alone.

    Each of `world` processes takes its share of every batch; a last batch that would not reach all of them is filled up.

    Attributes:
        epoch: set before each pass.
        weights: (N,) chances of being drawn (with replacement), or None for each image once.
    """

    def __init__(self, order: np.ndarray, batch_size: int, *, seed: int = 0, shuffle: str = "none", rank: int = 0, world: int = 1) -> None:
        """
        Args:
            order: indices, N of them.
            batch_size: images a batch over all processes.
            shuffle: "images", "batches" (their contents kept: rectangular training) or "none".
        """
        self.order, self.batch_size, self.seed, self.shuffle, self.rank, self.world = order, batch_size, seed, shuffle, rank, world
        self.epoch = 0
        self.weights: np.ndarray | None = None

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        rng = np.random.default_rng((self.seed, self.epoch, 2**31))  # apart from every sample's own stream
        order = self.order
        if self.weights is not None:
            order = rng.choice(order, len(order), p=self.weights / self.weights.sum())
        elif self.shuffle == "images":
            order = rng.permutation(order)
        missing = -len(order) % self.world
        filling = order[-1:] if self.shuffle == "batches" else order  # rectangular: of the last batch's own shape
        order = np.concatenate((order, np.resize(filling, missing)))
        starts = np.arange(len(self)) * self.batch_size
        if self.shuffle == "batches":
            starts = rng.permutation(starts)
        keys: list[Key] = [(self.epoch, int(i)) for i in order]
        if self.weights is not None:  # an image that is drawn again is augmented anew
            times: Counter[Key] = Counter()
            for n, key in enumerate(keys):
                times[key] += 1
                keys[n] = (*key, times[key]) if times[key] > 1 else key  # from 2: with 1 they would be --multi-scale's streams
        for start in starts:
            yield keys[start : start + self.batch_size][self.rank :: self.world]


def worker_count(asked: int) -> int:
    """Loader processes to start: what was asked, at most one for each core of this process's share, none on a single core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked, max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1) if cores > 1 else 0)


def _report_unless_cut_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A batch may be on its way to a training process that has just ended: the user has its one line already."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to handle
    sys.excepthook = _report_unless_cut_off
    cv2.setNumThreads(0)  # each worker is one thread's worth of work
    torch.set_num_threads(1)


def make_loader(dataset: Dataset, batches: EpochBatches, workers: int, pin_memory: bool) -> DataLoader:
    """A loader of `Batch`es whose workers outlive the epoch."""
    forks = "fork" in multiprocessing.get_all_start_methods()
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers and forks else None,  # the image cache is shared by forking
        generator=torch.Generator(),  # the loader must not draw from the global stream
    )
