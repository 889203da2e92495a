"""The embedded set: the same everywhere, labels true to the pixels, files whole or absent."""
from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import utils.data.shapes as shapes
from utils.data.scenes import _OUTLINES, NAMES, SIZES, _area_px, _coverage, _Dice, _place, _truth, render
from utils.errors import UserError

SEEDS = range(40)
# Of our own drawing, not of any library's output: they change only together with shapes.VERSION.
PIXELS = {0: "02d47da61a8f6af8", 1_000_000: "27c02e6e6c48538c"}


@pytest.fixture(scope="module")
def scenes():
    return [render(seed) for seed in SEEDS]


@pytest.fixture
def small(monkeypatch):
    """A set of few images, for the tests of files."""
    monkeypatch.setattr(shapes, "SPLITS", {"train": 2, "val": 1, "test": 1})


def _tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("seed", PIXELS)
def test_pixels_are_the_same_on_every_machine(seed):
    assert hashlib.sha256(render(seed).image.tobytes()).hexdigest()[:16] == PIXELS[seed]


def test_a_scene_is_a_function_of_its_seed():
    for a, b in zip(render(7), render(7), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(render(7).image[:100, :100], render(8).image[:100, :100])


def test_boxes_are_tight_around_the_visible_pixels(scenes):
    for scene in scenes:
        height, width = scene.image.shape[:2]
        assert scene.image.dtype == np.uint8 and (width, height) in SIZES
        assert len(scene.boxes) == len(scene.classes) == len(scene.masks)
        assert scene.masks.sum(0).max(initial=0) <= 1, "a pixel shows one object"
        for (x1, y1, x2, y2), mask in zip(scene.boxes, scene.masks, strict=True):
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            outside = mask.copy()
            outside[y1:y2, x1:x2] = False
            assert not outside.any()
            assert mask[y1, :].any() and mask[y2 - 1, :].any() and mask[:, x1].any() and mask[:, x2 - 1].any()


def test_classes_are_balanced_and_sizes_spread(scenes):
    counts = np.bincount(np.concatenate([s.classes for s in scenes]), minlength=len(NAMES))
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 1.6 * counts.mean()
    boxes = np.concatenate([s.boxes for s in scenes])
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    shares = np.histogram(sides, [0, 16, 32, 64, 256])[0] / len(sides)
    assert shares.min() > 0.1
    per_image = [len(s.boxes) for s in scenes]
    assert min(per_image) == 0 and max(per_image) <= 16 and np.mean(per_image) > 6


def test_objects_overlap_and_hidden_ones_lose_their_label(scenes):
    overlaps = 0
    for scene in scenes:
        x1, y1, x2, y2 = scene.boxes.T
        wide = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
        high = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
        overlaps += int(((wide > 0) & (high > 0)).sum()) - len(scene.boxes)
    assert overlaps > len(scenes)


@pytest.mark.parametrize(("visible_columns", "labelled"), [(10, True), (5, False)])
def test_an_object_needs_enough_of_its_area_visible(visible_columns, labelled):
    owner = np.full((40, 40), -1)
    owner[10:30, 10:30] = 1
    owner[10:30, 10 : 30 - visible_columns] = 0  # a square of 20 x 20, partly under another object
    truth = _truth(np.zeros((40, 40, 3), np.uint8), owner, [3, 5], [400, 400])
    assert truth.classes.tolist() == ([3, 5] if labelled else [3])
    assert truth.boxes[-1].tolist() == ([20, 10, 30, 30] if labelled else [10, 10, 25, 30])


def test_coverage_of_a_rectangle_by_hand():
    # x from 1.25 to 3.5 px, y from 1 to 2.5 px (in 1/64 px)
    rectangle = np.array([(80, 64), (224, 64), (224, 160), (80, 160)])
    expected = np.zeros((4, 5), int)
    expected[1] = [0, 192, 256, 128, 0]
    expected[2] = [0, 96, 128, 64, 0]
    np.testing.assert_array_equal(_coverage([rectangle], 5, 4), expected)
    np.testing.assert_array_equal(_coverage([rectangle[::-1]], 5, 4), expected)
    hole = rectangle[::-1]
    assert not _coverage([rectangle, hole], 5, 4).any()


@pytest.mark.parametrize("angle", [0, 30, 135, 301])
def test_coverage_agrees_with_the_area_and_with_opencv(angle):
    for name, outline in _OUTLINES.items():
        placed = _place(outline, (60, 50), (64, 60), angle)
        covered = _coverage(placed, 128, 120)
        assert covered.min() == 0 and covered.max() == 256
        assert covered.sum() / 256 == pytest.approx(_area_px(placed), rel=0.01), name
        drawn = np.zeros((120, 128), np.uint8)
        cv2.fillPoly(drawn, [c.astype(np.int32) for c in placed], 1, shift=6)
        assert np.mean((covered >= 128) != drawn) < 0.02, name


def test_clipped_objects_keep_what_lies_inside():
    whole = _coverage(_place(_OUTLINES["star"], (60, 60), (64, 64), 20), 128, 128)
    cut = _coverage(_place(_OUTLINES["star"], (60, 60), (24, 64), 20), 128, 128)
    np.testing.assert_array_equal(cut[:, :88], whole[:, 40:])


def test_dice_stay_in_range():
    dice = _Dice(3)
    draws = [dice.draw(-2, 2) for _ in range(500)]
    assert set(draws) == {-2, -1, 0, 1, 2}
    assert dice.bytes(3, 5).shape == (3, 5)


def test_labels_on_disk_give_the_boxes_back(tmp_path, small):
    root = shapes.ensure_shapes(tmp_path / "set", progress=False)
    assert root == tmp_path / "set"
    for split, number in (("train", 0), ("val", 1), ("test", 2)):
        files = sorted((root / "images" / split).iterdir())
        assert len(files) == shapes.SPLITS[split]
        for i, file in enumerate(files):
            scene, image = render(number * 1_000_000 + i), cv2.imread(str(file))
            np.testing.assert_array_equal(image, scene.image)
            height, width = image.shape[:2]
            label = np.loadtxt(root / "labels" / split / f"{file.stem}.txt", ndmin=2).reshape(-1, 5)
            np.testing.assert_array_equal(label[:, 0], scene.classes)
            centre, half = label[:, 1:3] * (width, height), label[:, 3:] * (width, height) / 2
            np.testing.assert_allclose(np.hstack((centre - half, centre + half)), scene.boxes, atol=1e-3)


def test_made_twice_it_is_equal_and_once_made_it_is_kept(tmp_path, small, monkeypatch):
    a, b = (shapes.ensure_shapes(tmp_path / name, progress=False) for name in "ab")
    assert _tree(a) == _tree(b)
    stamps = {p: p.stat().st_mtime_ns for p in a.rglob("*")}
    monkeypatch.delattr(shapes, "render")
    shapes.ensure_shapes(a, progress=False)
    assert {p: p.stat().st_mtime_ns for p in a.rglob("*")} == stamps


def test_another_version_is_drawn_again(tmp_path, small):
    root = shapes.ensure_shapes(tmp_path / "set", progress=False)
    whole = _tree(root)
    (root / "VERSION").write_text(shapes.VERSION[:-1] + "0")
    (root / "labels" / "train" / "00000.txt").write_text("old")
    shapes.ensure_shapes(root, progress=False)
    assert _tree(root) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_folder_of_other_files_is_left_alone(tmp_path, small):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        shapes.ensure_shapes(tmp_path / "photos")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        shapes.ensure_shapes(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert (shapes.ensure_shapes(tmp_path / "empty", progress=False) / "VERSION").is_file()


def test_leftovers_of_killed_processes_are_removed(tmp_path, small):
    for name, age_s in ((".set.drawing-old", 7200), (".set.drawing-now", 0)):
        (tmp_path / name).mkdir()
        stamp = time.time() - age_s
        os.utime(tmp_path / name, (stamp, stamp))
    shapes.ensure_shapes(tmp_path / "set", progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"set", ".set.drawing-now"}, "the other may be at work"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(tmp_path, small, monkeypatch, stop):
    calls = []

    def failing(seed):
        calls.append(seed)
        if len(calls) > 2:
            raise stop
        return render(seed)

    monkeypatch.setattr(shapes, "render", failing)
    with pytest.raises((KeyboardInterrupt, OSError)):
        shapes.ensure_shapes(tmp_path / "set", progress=False)
    assert list(tmp_path.iterdir()) == []


def _ensure(root: Path, barrier) -> None:
    shapes.SPLITS = {"train": 2, "val": 1, "test": 1}
    barrier.wait(60)
    shapes.ensure_shapes(root, progress=False)


@pytest.mark.parametrize("before", ["nothing", "an old version"])
def test_two_processes_at_once(tmp_path, small, before):
    root = tmp_path / "set"
    if before != "nothing":
        shapes.ensure_shapes(root, progress=False)
        (root / "VERSION").write_text(shapes.VERSION[:-1] + "0")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_ensure, args=(root, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    assert _tree(root) == _tree(shapes.ensure_shapes(tmp_path / "reference", progress=False))
    assert {p.name for p in tmp_path.iterdir()} == {"set", "reference"}


def test_the_script_draws_set_and_sheet(tmp_path, small):
    assert shapes.main(["--out", str(tmp_path / "set"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[2] == 3
    (tmp_path / "file").touch()
    assert shapes.main(["--out", str(tmp_path / "file")]) == 2
