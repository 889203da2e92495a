"""Samples, the cache they come through, and the batches they make: the same whatever the workers, the cache and the past."""
from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny import data_yaml, make_split, picture_split

from utils.boxes import cxcywh_to_xyxy
from utils.config import ValConfig
from utils.cpu import free_memory_bytes
from utils.data import imagecache
from utils.data.augment import letterbox
from utils.data.dataset import Batch, RectDataset, Sample, TrainDataset, collate, rect_order, rect_targets, scaled_sizes
from utils.data.imagecache import ImageCache, memory_limit
from utils.data.images import read_image
from utils.data.labels import Split
from utils.data.loader import EpochBatches, make_loader, worker_count
from utils.data.open import open_splits, val_loader
from utils.errors import UserError
from utils.hyp import Hyp

SIZES = [(64, 64), (96, 48), (48, 96), (80, 60), (33, 70), (128, 128), (64, 40)]
EVERYTHING = Hyp(degrees=10, shear=3, perspective=0.0002, flipud=0.5, mixup=0.5, mosaic=0.7)
STILL = Hyp(mosaic=0, hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0)
IMGSZ = 64


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return picture_split(tmp_path_factory.mktemp("pictures"), SIZES)


def cache_of(split: Split, mode: str = "none", budget: int = 0, folder: Path | None = None) -> ImageCache:
    return ImageCache(scaled_sizes(split, IMGSZ), mode, budget if mode == "auto" else 2**40, folder)


def training_set(split: Split, hyp: Hyp = EVERYTHING, cache: ImageCache | None = None, seed: int = 0) -> TrainDataset:
    return TrainDataset(split, IMGSZ, hyp, cache or cache_of(split), seed)


def assert_same(a: Sample, b: Sample) -> None:
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.boxes, b.boxes)


def batches_of(dataset: TrainDataset | RectDataset, workers: int, epochs: int = 2, shuffle: str = "images") -> list[Batch]:
    batches = EpochBatches(np.arange(len(dataset)), 3, seed=5, shuffle=shuffle)
    loader, seen = make_loader(dataset, batches, workers, False), []
    for batches.epoch in range(epochs):
        seen += list(loader)
    return seen


# samples


def test_a_key_gives_the_same_sample_whatever_came_before(split: Split) -> None:
    first, second = training_set(split), training_set(split)
    for index in (3, 1, 0):
        _ = second[7, index]
    for key in ((0, 0), (0, 3), (2, 3)):
        assert_same(first[key], second[key])


def test_every_epoch_seed_and_image_has_its_own_augmentation(split: Split) -> None:
    seen = [training_set(split, seed=seed)[epoch, index].image for seed in (0, 1) for epoch in (0, 1, 2) for index in (0, 1)]
    assert len({image.tobytes() for image in seen}) == len(seen)


def test_sample_form(split: Split) -> None:
    for index in range(len(SIZES)):
        sample = training_set(split)[0, index]
        assert sample.image.shape == (IMGSZ, IMGSZ, 3) and sample.image.dtype == np.uint8 and sample.index == index
        assert sample.boxes.dtype == np.float32 and sample.boxes.shape[1] == 5
        corners = cxcywh_to_xyxy(sample.boxes[:, 1:])
        assert (corners >= -1e-6).all() and (corners <= 1 + 1e-6).all()


def test_without_augmentation_the_image_is_only_scaled_and_centred(split: Split) -> None:
    """96 x 48 at 64 becomes 64 x 32, 16 rows of grey above; RGB, while files are read as BGR."""
    sample = training_set(split, STILL)[0, 1]
    own = cv2.resize(cv2.imread(split.images[1]), (64, 32), interpolation=cv2.INTER_AREA)[..., ::-1]
    np.testing.assert_array_equal(sample.image[16:48], own)
    assert (sample.image[:16] == 114).all() and (sample.image[48:] == 114).all()
    expected = split.boxes[1] * (1, 1, 0.5, 1, 0.5) + (0, 0, 0.25, 0, 0)
    np.testing.assert_allclose(sample.boxes, expected, atol=1e-6)


def test_mosaic_and_mixup_bring_boxes_of_other_images(split: Split) -> None:
    boxes = lambda **hyp: sum(len(training_set(split, dataclasses.replace(STILL, **hyp))[e, 0].boxes) for e in range(12))  # noqa: E731
    single, mosaic, mixup = boxes(), boxes(mosaic=1), boxes(mosaic=1, mixup=1)
    assert single < mosaic < mixup
    assert boxes(mixup=1) == single, "only mosaics are mixed"


def test_a_background_image_gives_no_boxes(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    split = make_split([str(tmp_path / "a.png")], [(64, 64)], [np.zeros((0, 5))])
    for sample in (training_set(split)[0, 0], RectDataset(split, IMGSZ, cache_of(split), np.array([[64, 64]]), EVERYTHING)[0, 0]):
        assert sample.boxes.shape == (0, 5) and collate([sample, sample]).targets.shape == (0, 6)


# rectangular batches


def test_rect_targets_by_hand() -> None:
    """Two images a batch, by height / width: 100 x 50 and 64 x 48 share 1 x 0.75; 80 x 80 and 30 x 60 share 1 x 1; 30 x 90 is left alone."""
    split = make_split(list("abcde"), [(80, 80), (30, 90), (100, 50), (30, 60), (64, 48)], [[]] * 5)
    assert rect_order(split).tolist() == [2, 4, 0, 3, 1]
    # ceil(1 * 640 / 32 + 0.5) = 21 -> 672; ceil(0.75 * 640 / 32 + 0.5) = 16 -> 512; ceil(640 / 3 / 32 + 0.5) = ceil(7.17) -> 256
    assert rect_targets(split, 640, 32, 2).tolist() == [[672, 672], [256, 672], [672, 512], [672, 672], [672, 512]]
    assert rect_targets(split, 640, None, 2).tolist() == [[640, 640]] * 5
    assert rect_targets(split, (384, 640), None, 2).tolist() == [[640, 384]] * 5
    assert rect_targets(split, 640, 32, 2, pad=0.0).tolist() == [[640, 640], [224, 640], [640, 480], [640, 640], [640, 480]]


@pytest.mark.parametrize("frame", [(32, 96), (96, 32), (64, 64)])
def test_images_lie_in_a_frame_as_in_detection(frame: tuple[int, int], split: Split) -> None:
    images = ImageCache(scaled_sizes(split, frame), "none", 0)
    dataset = RectDataset(split, frame, images, rect_targets(split, frame, None, 3))
    for index in range(len(SIZES)):
        sample = dataset[0, index]
        padded, place = letterbox(read_image(split.images[index]), frame, None)
        assert sample.image.shape == padded.shape == (*frame, 3) and sample.letterbox == place


def test_letterboxed_labels_go_back_exactly(split: Split) -> None:
    dataset = RectDataset(split, IMGSZ, cache_of(split), rect_targets(split, IMGSZ, 32, 3))
    for index, (width, height) in enumerate(SIZES):
        sample = dataset[0, index]
        padded_h, padded_w = sample.image.shape[:2]
        assert padded_h % 32 == padded_w % 32 == 0
        padded = cxcywh_to_xyxy(sample.boxes[:, 1:].astype(float)) * np.tile((padded_w, padded_h), 2)
        original = cxcywh_to_xyxy(split.boxes[index][:, 1:].astype(float)) * np.tile((width, height), 2)
        np.testing.assert_allclose(sample.letterbox.back(padded), original, atol=1e-3)
        for (cls, *_), (x1, y1, x2, y2) in zip(sample.boxes, padded.round().astype(int), strict=True):
            inside = sample.image[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].reshape(-1, 3)
            assert (inside.mean(0).argmax() == cls), "red boxes are red, green ones green: RGB, at their places"


def test_rect_training_augments_without_mosaic(split: Split) -> None:
    targets = rect_targets(split, IMGSZ, 32, 3, pad=0.0)
    dataset = RectDataset(split, IMGSZ, cache_of(split), targets, EVERYTHING)
    plain = RectDataset(split, IMGSZ, cache_of(split), targets)
    for index in range(len(SIZES)):
        assert dataset[0, index].image.shape[:2] == tuple(targets[index][::-1])
        assert len(dataset[0, index].boxes) == len(plain[0, index].boxes)
    assert (dataset[0, 0].image != dataset[1, 0].image).any() and (plain[0, 0].image == plain[1, 0].image).all()


# the cache


def test_every_cache_gives_equal_samples(split: Split, tmp_path: Path) -> None:
    half = int(scaled_sizes(split, IMGSZ).prod(1).sum() * 3 // 2)
    caches = {mode: cache_of(split, mode, half, tmp_path) for mode in ("none", "ram", "disk", "auto")}
    assert caches["none"].capacity == 0 and caches["ram"].capacity == caches["disk"].capacity == len(SIZES)
    assert 0 < caches["auto"].capacity < len(SIZES) and caches["auto"].bytes <= half
    targets = rect_targets(split, IMGSZ, 32, 3)
    expected = [training_set(split)[e, i] for e in (0, 1) for i in range(len(SIZES))]
    shown = [RectDataset(split, IMGSZ, cache_of(split), targets)[0, i] for i in range(len(SIZES))]
    for mode, cache in caches.items():
        dataset = training_set(split, cache=cache)
        for sample, wanted in zip([dataset[e, i] for e in (0, 1) for i in range(len(SIZES))], expected, strict=True):
            assert_same(sample, wanted)
        own = cache if mode != "disk" else cache_of(split, "disk", folder=tmp_path)
        for i, wanted in enumerate(shown):
            assert_same(RectDataset(split, IMGSZ, own, targets)[0, i], wanted)
    assert not list(tmp_path.iterdir()), "the disk file has no name"


def no_reading() -> np.ndarray:
    raise AssertionError("it should be in the cache")


def test_an_image_that_is_drawn_again_is_augmented_anew(tmp_path):
    split = picture_split(tmp_path, [(64, 64)] * 3)
    dataset = TrainDataset(split, 64, Hyp(), ImageCache(scaled_sizes(split, 64), "none", 0))
    batches = EpochBatches(np.arange(3), 3)
    batches.weights = np.array([1.0, 0, 0])
    ((first, second, third),) = list(batches)
    assert (first, second, third) == ((0, 0), (0, 0, 2), (0, 0, 3)), "the first as without weights"
    pixels = [dataset[key].image for key in (first, second, third)]
    assert not any(np.array_equal(pixels[n], pixels[n - 1]) for n in range(3))


@pytest.mark.parametrize(("processes", "workers"), [("1", 4), ("2", 2), ("8", 1)])
def test_processes_share_the_cores(monkeypatch, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert worker_count(8) == workers


def test_more_images_than_memory_are_refused(monkeypatch):
    monkeypatch.setattr(imagecache, "free_memory_bytes", lambda: 3 * 100 * 80 - 1)
    sizes = np.array([[100, 80]])
    with pytest.raises(UserError, match=r"--cache ram: the images take 0\.0 GB.*--cache auto or disk"):
        ImageCache(sizes, "ram", memory_limit("ram", 1))
    assert ImageCache(sizes, "auto", memory_limit("auto", 1)).capacity == 0
    monkeypatch.setattr(imagecache, "free_memory_bytes", lambda: 3 * 100 * 80 * 2)
    assert ImageCache(sizes, "ram", memory_limit("ram", 2)).capacity == ImageCache(sizes, "auto", memory_limit("auto", 1)).capacity == 1
    assert ImageCache(sizes, "auto", memory_limit("auto", 2)).capacity == 0
    with pytest.raises(UserError, match=r"0\.0 GB are free for them"):
        ImageCache(sizes, "ram", memory_limit("ram", 3))
    assert memory_limit("ram", 1, taken=20_000) == 28_000 and memory_limit("auto", 1, taken=20_000) == 14_000 and memory_limit("ram", 1, 10**6) == 0
    monkeypatch.setattr(imagecache, "free_memory_bytes", lambda: 0)  # a system that does not tell
    assert ImageCache(sizes, "ram", memory_limit("ram", 2)).capacity == 1 and ImageCache(sizes, "auto", memory_limit("auto", 1)).capacity == 0


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_workers_fill_the_parents_cache(split: Split, tmp_path: Path, mode: str) -> None:
    """One block of memory for all: what a worker decoded, the training process has."""
    cache = cache_of(split, mode, folder=tmp_path)
    batches_of(RectDataset(split, IMGSZ, cache, np.full((len(SIZES), 2), 64)), workers=2, epochs=1)
    for index in range(len(SIZES)):
        mine = RectDataset(split, IMGSZ, cache_of(split), scaled_sizes(split, IMGSZ))[0, index].image
        np.testing.assert_array_equal(cache.get(index, no_reading), mine[..., ::-1])


def test_auto_without_memory_caches_nothing(split: Split) -> None:
    assert cache_of(split, "auto", 0).capacity == 0
    assert free_memory_bytes() > 2**20


def test_without_fork_nothing_is_kept(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert cache_of(split, "ram").capacity == 0 and len(training_set(split, cache=cache_of(split, "ram"))[0, 0].image)


def test_a_full_disk_is_an_error_before_training(split: Split, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        cache_of(split, "disk", folder=tmp_path)


def test_reading_error_leaves_the_slot_empty(split: Split) -> None:
    cache = cache_of(split, "ram")
    with pytest.raises(AssertionError):
        cache.get(0, no_reading)
    assert (cache.get(0, lambda: np.full((64, 64, 3), 9, np.uint8)) == 9).all()
    assert (cache.get(0, no_reading) == 9).all()


# broken files


@pytest.mark.parametrize("damage", ["gone", "truncated", "text"])
def test_an_image_that_breaks_later_is_reported_and_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str) -> None:
    split = picture_split(tmp_path, SIZES[:4])
    victim = Path(split.images[2])
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:600] if damage == "truncated" else b"no image")
    dataset = training_set(split, STILL)
    for _ in range(2):
        sample = dataset[0, 2]
        assert (sample.image == 114).all() and sample.boxes.shape == (0, 5)
    err = capfd.readouterr().err
    assert err.count(str(victim)) == 1 and err.count("\n") == 1 and "a grey image stands in" in err
    assert len(dataset[0, 0].boxes)
    batches = batches_of(training_set(split), workers=2)
    assert sorted(i for b in batches for i in b.indices) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert str(victim) in capfd.readouterr().err


def test_an_image_that_another_size_replaced_is_scaled_to_the_known_one(tmp_path: Path) -> None:
    split = picture_split(tmp_path, [(64, 48)])
    cv2.imwrite(split.images[0], np.full((200, 100, 3), 50, np.uint8))
    for mode in ("none", "ram"):
        assert training_set(split, STILL, cache_of(split, mode))[0, 0].image.shape == (64, 64, 3)


# batches


def test_workers_change_nothing(split: Split) -> None:
    """Bit for bit, over two epochs, with everything random switched on."""
    alone, helped = (batches_of(training_set(split, cache=cache_of(split, mode)), workers) for workers, mode in ((0, "none"), (2, "ram")))
    assert len(alone) == len(helped) == 6
    for a, b in zip(alone, helped, strict=True):
        assert a.indices == b.indices and torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
    assert not torch.equal(alone[0].images, alone[3].images)


def test_the_loader_leaves_the_global_stream_alone(split: Split) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    batches_of(training_set(split), workers=0)
    batches_of(training_set(split), workers=1, epochs=1)
    assert torch.equal(torch.rand(2), expected)


def test_collate_by_hand(split: Split) -> None:
    samples = [training_set(split, STILL)[0, i] for i in (0, 4)]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.indices == (0, 4) and batch.letterboxes == (samples[0].letterbox, samples[1].letterbox)
    for n, sample in enumerate(samples):
        np.testing.assert_array_equal(batch.images[n].permute(1, 2, 0), sample.image)
        np.testing.assert_array_equal(batch.targets[batch.targets[:, 0] == n][:, 1:], sample.boxes)


def indices(batches: EpochBatches) -> list[list[int]]:
    return [[i for _, i in batch] for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_epoch_batches_in_order() -> None:
    batches = EpochBatches(np.array([4, 2, 0, 1, 3]), 2)
    assert indices(batches) == [[4, 2], [0, 1], [3]] and len(batches) == 3
    batches.epoch = 7
    assert next(iter(batches)) == [(7, 4), (7, 2)]


def test_epoch_batches_shuffle_by_seed_and_epoch() -> None:
    def drawn(seed: int, epoch: int, shuffle: str = "images") -> list[list[int]]:
        batches = EpochBatches(np.arange(10), 3, seed=seed, shuffle=shuffle)
        batches.epoch = epoch
        return indices(batches)

    assert drawn(0, 0) == drawn(0, 0) and len({str(drawn(s, e)) for s in (0, 1) for e in (0, 1, 2)}) == 6
    assert sorted(flat(drawn(0, 3))) == list(range(10))
    whole = drawn(0, 1, "batches")
    assert sorted(whole) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert len({str(drawn(0, e, "batches")) for e in range(6)}) > 2


@pytest.mark.parametrize("shuffle", ["none", "images", "batches"])
@pytest.mark.parametrize(("count", "batch_size"), [(8, 4), (7, 4), (9, 4), (1, 2), (5, 2)])
def test_two_processes_share_each_batch(count: int, batch_size: int, shuffle: str) -> None:
    ranks = [indices(EpochBatches(np.arange(count), batch_size, seed=1, shuffle=shuffle, rank=r, world=2)) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == -(-count // batch_size)
    assert all(len(a) == len(b) > 0 for a, b in zip(*ranks, strict=True)), "gradients are averaged: each process must have as many"
    drawn = flat(ranks[0] + ranks[1])
    assert set(drawn) == set(range(count)) and len(drawn) == count + count % 2
    if count % 2 == 0:
        single = indices(EpochBatches(np.arange(count), batch_size, seed=1, shuffle=shuffle))
        assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in single]


def test_weights_draw_with_replacement() -> None:
    batches = EpochBatches(np.arange(1000), 10, shuffle="images")
    batches.weights = np.where(np.arange(1000) < 500, 3.0, 1.0)
    batches.weights[7] = 0
    drawn = [key[1] for batch in batches for key in batch]
    assert len(drawn) == 1000 and 7 not in drawn and len(set(drawn)) < 900
    assert sum(i < 500 for i in drawn) == pytest.approx(750, abs=60)


# from the command line's settings


def test_open_splits_and_val_loader(tmp_path: Path) -> None:
    data = data_yaml(tmp_path)
    options = ValConfig(data=str(data))
    train, val = open_splits(options, ("train", "val"))
    assert (len(train.images), len(val.images)) == (6, 4) and val.names == ("red", "green")
    (single,) = open_splits(dataclasses.replace(options, single_cls=True), ("val",))
    assert single.names == ("item",) and all((b[:, 0] == 0).all() for b in single.boxes)
    loader = val_loader(val, 64, 3, 32, 0, torch.device("cpu"))
    batches = list(loader)
    assert [len(b.images) for b in batches] == [3, 1] and sum((b.indices for b in batches), ()) == tuple(rect_order(val))
    assert batches[0].images.shape[2:] == (96, 96)
    with pytest.raises(UserError, match="nowhere"):
        open_splits(dataclasses.replace(options, data="nowhere.yaml"), ("val",))
