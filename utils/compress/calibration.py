"""The images that int8's ranges are measured on: training images, letterboxed as validation letterboxes, never augmented."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.data.dataset import RectDataset, rect_targets, scaled_sizes
from utils.data.imagecache import ImageCache
from utils.data.labels import Split
from utils.data.loader import EpochBatches, make_loader
from utils.errors import UserError
from utils.log import info

FEWEST = 8  # of which ranges, or a norm's statistics, say anything


class CalibrationImages:
    """Some images of a split, drawn once with a seed: each pass over them gives (1, 3, H, W) float32 arrays in 0..1, the same ones."""

    def __init__(self, loader: DataLoader, count: int) -> None:
        self._loader, self._count = loader, count

    @classmethod
    def of(cls, split: Split, count: int, imgsz: int, seed: int = 0, origin: str = "data") -> CalibrationImages:
        """
        Args:
            count: that many, or all where there are fewer: then a line says so.
            imgsz: side of the squares, pixels.
            origin: the data YAML, for the line that says what is wrong with it.

        Raises:
            UserError: too few images to measure a range on.
        """
        there = len(split.images)
        if there < FEWEST:
            raise UserError(f"{origin}: its training split has {there} images, and int8 needs {FEWEST} to calibrate on, better some hundred")
        if there < count:
            info(f"--calib {count}: the training split has {there} images: calibrated on all of them")
        chosen = np.random.default_rng(seed).permutation(there)[:count]
        dataset = RectDataset(split, imgsz, ImageCache(scaled_sizes(split, imgsz), "none", 0), rect_targets(split, imgsz, None, 1))
        return cls(make_loader(dataset, EpochBatches(chosen, 1), workers=0, pin_memory=False), len(chosen))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self._loader:
            yield np.ascontiguousarray(batch.images.numpy(), np.float32) / 255

    def shown(self, title: str) -> Iterator[np.ndarray]:
        """One pass with a progress bar."""
        yield from tqdm(self, desc=title, leave=False, dynamic_ncols=True)

    def first(self, count: int) -> np.ndarray:
        """(count, 3, H, W), or as many as there are."""
        return np.concatenate([image for image, _ in zip(self, range(count), strict=False)])
