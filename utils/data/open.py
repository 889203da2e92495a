"""From a script's data options to verified splits."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from utils.config import DataOptions
from utils.data.dataset import Frame, RectDataset, rect_order, rect_targets, scaled_sizes
from utils.data.download import cut_off, download
from utils.data.imagecache import CacheMode, ImageCache
from utils.data.labels import Split, load_split
from utils.data.loader import EpochBatches, make_loader, worker_count
from utils.data.spec import load_data_spec
from utils.errors import UserError


def open_splits(options: DataOptions, names: Sequence[str]) -> list[Split]:
    """The named splits of `--data`, fetched first where `--download` asks for it and something of them is missing.

    Raises:
        UserError: no such data YAML, a missing, empty or half unpacked set, or labels that must be mended.
    """
    root = options.data_root or None
    spec = load_data_spec(options.data, root)
    cut = cut_off(spec)
    if options.download and (cut or any(spec.found(entry) is None for name in names for entry in spec.splits.get(name, ()))):
        download(spec)
        spec = load_data_spec(options.data, root)  # its root is only now to be found
    elif cut:
        raise UserError(f"{spec.file}: {cut} was not unpacked to its end, or another process does so now; {spec.mend()}")
    return [load_split(spec, name, single_cls=options.single_cls) for name in names]


def val_loader(
    split: Split, imgsz: Frame, batch_size: int, stride: int | None, workers: int, device: torch.device,
    cache: CacheMode = "none", limit_bytes: int = 0, folder: Path | None = None,
) -> DataLoader:
    """Rectangular batches of a split in a fixed order, all of `imgsz` without a `stride`; see `RectDataset` and `ImageCache` for the arguments."""
    images = ImageCache(scaled_sizes(split, imgsz), cache, limit_bytes, folder)
    dataset = RectDataset(split, imgsz, images, rect_targets(split, imgsz, stride, batch_size))
    return make_loader(dataset, EpochBatches(rect_order(split), batch_size), worker_count(workers), device.type == "cuda")
