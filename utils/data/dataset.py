"""A verified split as samples: an image ready for the network with its boxes, augmented for training or letterboxed for validation."""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.boxes import Letterbox, centre_in, cxcywh_to_xyxy, fitted, xyxy_to_cxcywh
from utils.data import augment
from utils.data.imagecache import ImageCache
from utils.data.images import ImageError, read_image
from utils.data.labels import Split
from utils.hyp import Hyp
from utils.log import warn

Key = tuple[int, ...]  # (epoch, index), drawn for the n-th time (epoch, index, n): all that a sample's randomness depends on, besides the seed

Frame = int | tuple[int, int]  # what images are scaled to: a longer side, or the (height, width) that they fit into


class Sample(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8 RGB
    boxes: np.ndarray  # (n, 5) float32 class, cx, cy, w, h, normalised to this image
    index: int
    letterbox: Letterbox


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) uint8 RGB, channels last in memory
    targets: Tensor  # (T, 6) float32: image in the batch, class, cx, cy, w, h, normalised
    indices: tuple[int, ...]
    letterboxes: tuple[Letterbox, ...]


class _Images:
    """Reading through the cache; a file that no longer decodes is reported once and stands in as grey without boxes."""

    def __init__(self, split: Split, imgsz: Frame, cache: ImageCache, reduced_decode: bool) -> None:
        self.split, self.cache, self.reduced_decode = split, cache, reduced_decode
        self._sizes = scaled_sizes(split, imgsz)
        self._reported: set[int] = set()

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) BGR, scaled to imgsz, and its (n, 5) boxes, normalised."""
        boxes = self.split.boxes[index]
        try:
            return self.cache.get(index, lambda: self._decode(index)), boxes
        except ImageError as error:
            if index not in self._reported:
                self._reported.add(index)
                warn(f"{error}; a grey image stands in for it, whose objects a validation counts as missed")
            width, height = self._sizes[index]
            return np.full((height, width, 3), augment.GREY, np.uint8), boxes[:0]

    def _decode(self, index: int) -> np.ndarray:
        whole, scaled = max(self.split.sizes[index]), tuple(self._sizes[index].tolist())
        # JPEG can be decoded at a half, a quarter or an eighth for nearly nothing; training does not mind the softer filter.
        reduce = max((r for r in (1, 2, 4, 8) if whole >= r * max(scaled)), default=1) if self.reduced_decode else 1
        return augment.resize(read_image(self.split.images[index], reduce), scaled)


def scaled_sizes(split: Split, imgsz: Frame) -> np.ndarray:
    """(N, 2) width, height of each image with its longer side at `imgsz`, or fitted into (height, width)."""
    frame = imgsz if isinstance(imgsz, tuple) else (imgsz, imgsz)
    return np.array([fitted((int(w), int(h)), frame) for w, h in split.sizes], np.int32).reshape(-1, 2)


class TrainDataset(torch.utils.data.Dataset):
    """Augmented square samples. Each draws from its own generator of (seed, epoch, index): workers and resumption change nothing."""

    def __init__(self, split: Split, imgsz: int, hyp: Hyp, cache: ImageCache, seed: int = 0) -> None:
        self.images = _Images(split, imgsz, cache, reduced_decode=True)
        self.imgsz, self.hyp, self.seed = imgsz, hyp, seed

    def __len__(self) -> int:
        return len(self.images.split.images)

    def __getitem__(self, key: Key) -> Sample:
        index, rng = key[1], np.random.default_rng((self.seed, *key))
        use_mosaic = rng.random() < self.hyp.mosaic
        sample = self._mosaic(index, rng) if use_mosaic else self._single(index, rng)
        if use_mosaic and rng.random() < self.hyp.mixup:
            sample = augment.mix_up(sample, self._mosaic(int(rng.integers(len(self))), rng), rng)
        return _finish(*sample, index, self.hyp, rng)

    def _mosaic(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        four = [self._read_px(int(i)) for i in (index, *rng.integers(len(self), size=3))]
        image, boxes = augment.mosaic([image for image, _ in four], [boxes for _, boxes in four], self.imgsz, rng)
        return augment.random_affine(image, boxes, self.hyp, (self.imgsz, self.imgsz), rng)

    def _single(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image, boxes = self._read_px(index)
        return augment.random_affine(image, boxes, self.hyp, (self.imgsz, self.imgsz), rng)

    def _read_px(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, boxes = self.images.read(index)
        height, width = image.shape[:2]
        return image, np.concatenate((boxes[:, :1], cxcywh_to_xyxy(boxes[:, 1:]) * np.array((width, height, width, height), np.float32)), 1)


class RectDataset(torch.utils.data.Dataset):
    """Samples letterboxed to a shape that each batch shares: validation, and training with --rect (then flipped and recoloured, no mosaic)."""

    def __init__(self, split: Split, imgsz: Frame, cache: ImageCache, targets: np.ndarray, hyp: Hyp | None = None, seed: int = 0) -> None:
        """
        Args:
            targets: (N, 2) width, height that each image is padded to; see `rect_targets`.
            hyp: augments with these if given.
        """
        self.images = _Images(split, imgsz, cache, reduced_decode=hyp is not None)
        self.targets, self.hyp, self.seed = targets, hyp, seed

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: Key) -> Sample:
        index = key[1]
        image, boxes = self.images.read(index)
        target = tuple(int(v) for v in self.targets[index])
        box = centre_in(tuple(int(v) for v in self.images.split.sizes[index]), (image.shape[1], image.shape[0]), target)
        normalised = np.concatenate((boxes[:, :1], _into(boxes[:, 1:], box, target)), 1).astype(np.float32)
        image = augment.pad(image, box, target)
        if self.hyp is None:
            return Sample(image[..., ::-1], normalised, index, box)
        pixels = np.concatenate((boxes[:, :1], cxcywh_to_xyxy(normalised[:, 1:]) * np.array(target * 2, np.float32)), 1)
        return _finish(image, pixels, index, self.hyp, np.random.default_rng((self.seed, *key)))


def _into(cxcywhn: np.ndarray, box: Letterbox, target: tuple[int, int]) -> np.ndarray:
    """Boxes normalised to the original image -> normalised to the padded one."""
    xyxy = cxcywh_to_xyxy(cxcywhn.astype(np.float64)) * np.array((box.width, box.height) * 2)
    return xyxy_to_cxcywh(box.forward(xyxy) / np.array(target * 2))


def _finish(image: np.ndarray, boxes: np.ndarray, index: int, hyp: Hyp, rng: np.random.Generator) -> Sample:
    """The augmentations of every training sample: colour and flips."""
    image = augment.random_hsv(image, hyp, rng)
    image, boxes = augment.random_flip(image, boxes, hyp, rng)
    height, width = image.shape[:2]
    normalised = np.concatenate((boxes[:, :1], xyxy_to_cxcywh(boxes[:, 1:] / np.array((width, height, width, height), np.float32))), 1)
    return Sample(image[..., ::-1], normalised.astype(np.float32), index, Letterbox(1.0, 1.0, 0, 0, width, height))


def rect_order(split: Split) -> np.ndarray:
    """Indices by aspect ratio, tallest last, so that the images of a batch need little padding."""
    return np.argsort(split.sizes[:, 1] / split.sizes[:, 0], kind="stable")


def rect_targets(split: Split, imgsz: Frame, stride: int | None, batch_size: int, pad: float = 0.5) -> np.ndarray:
    """(N, 2) width, height for each image: the shape that its batch of `rect_order` shares, `ceil(side * imgsz / stride + pad) * stride`.

    `side` is the largest of the batch, relative to each image's longer one. Without a stride all are squares of `imgsz`, or of its height and width.
    """
    if stride is None:
        return np.full((len(split.sizes), 2), imgsz[::-1] if isinstance(imgsz, tuple) else imgsz, np.int64)
    sides = split.sizes / split.sizes.max(1, keepdims=True)
    targets = np.empty((len(sides), 2), np.int64)
    order = rect_order(split)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        targets[batch] = [math.ceil(side * imgsz / stride + pad) * stride for side in sides[batch].max(0)]
    return targets


def collate(samples: list[Sample]) -> Batch:
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)
    targets = [np.concatenate((np.full((len(s.boxes), 1), n, np.float32), s.boxes), 1) for n, s in enumerate(samples)]
    return Batch(images, torch.from_numpy(np.concatenate(targets)), tuple(s.index for s in samples), tuple(s.letterbox for s in samples))
