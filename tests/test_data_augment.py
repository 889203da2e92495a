"""Boxes follow their pixels: a box is painted, the image augmented, and the paint found again."""
from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from utils.boxes import Letterbox, centre_in
from utils.data import augment
from utils.hyp import Hyp

STILL = Hyp(translate=0, scale=0, fliplr=0, mosaic=0, hsv_h=0, hsv_s=0, hsv_v=0)
PAINT = (250, 30, 20)


def hyp(**values: float) -> Hyp:
    return dataclasses.replace(STILL, **values)


def painted(width: int, height: int, box: tuple[int, int, int, int], cls: int = 0) -> tuple[np.ndarray, np.ndarray]:
    image = np.full((height, width, 3), 60, np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = PAINT
    return image, np.array([[cls, *box]], np.float32)


def found(image: np.ndarray) -> np.ndarray:
    """The corners of what is painted: blue beyond the half of paint on grey, so that a resampled edge is right to half a pixel."""
    y, x = np.nonzero(image[..., 0] > (PAINT[0] + augment.GREY) / 2)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def test_resize_and_pad_by_hand() -> None:
    image = np.full((30, 40, 3), 7, np.uint8)
    assert augment.resize(image, (40, 30)) is image
    assert augment.resize(image, (20, 15)).shape == (15, 20, 3)
    padded = augment.pad(image, centre_in(image.shape[1::-1], image.shape[1::-1], (45, 33)), (45, 33))  # 5 and 3 to spread: 2 left, 1 above
    assert padded.shape == (33, 45, 3)
    assert (padded[1:31, 2:42] == 7).all() and (padded == 7).sum() == 30 * 40 * 3 and set(np.unique(padded)) == {7, 114}


def test_letterbox_by_hand() -> None:
    """1920 x 1080 at 640 becomes 640 x 360, padded to 640 x 384: 12 above."""
    image, box = augment.letterbox(np.zeros((1080, 1920, 3), np.uint8), (640, 640), 32)
    assert image.shape == (384, 640, 3)
    assert box == Letterbox(640 / 1920, 360 / 1080, 0, 12, 1920, 1080)
    assert (image[:12] == 114).all() and (image[12:372] == 0).all() and (image[372:] == 114).all()


@pytest.mark.parametrize("size", [(97, 41), (41, 97), (64, 64), (500, 333), (20, 31)])
def test_letterboxed_paint_goes_back(size: tuple[int, int]) -> None:
    width, height = size
    truth = np.array([width // 4, height // 3, width - 5, height - 7])
    image, box = augment.letterbox(painted(width, height, tuple(truth))[0], (160, 160), 32)
    assert max(image.shape) == 160 and image.shape[0] % 32 == image.shape[1] % 32 == 0
    np.testing.assert_allclose(found(image), box.forward(truth.astype(float)), atol=1.01)
    np.testing.assert_allclose(box.back(box.forward(truth.astype(float))), truth, atol=1e-9)


@pytest.mark.parametrize("values", [
    {}, {"translate": 0.2}, {"scale": 0.5}, {"degrees": 90}, {"shear": 20}, {"perspective": 0.001},
    {"degrees": 30, "scale": 0.4, "shear": 10, "translate": 0.1, "perspective": 0.0005},
], ids=lambda v: "+".join(v) or "none")  # fmt: skip
def test_affine_moves_boxes_with_their_pixels(values: dict[str, float]) -> None:
    checked = 0
    for seed in range(12):
        image, boxes = painted(200, 160, (70, 50, 130, 100))
        out, moved = augment.random_affine(image, boxes, hyp(**values), (220, 180), np.random.default_rng(seed))
        assert out.shape == (180, 220, 3)
        if not len(moved):
            continue
        checked += 1
        np.testing.assert_allclose(moved[0, 1:], found(out), atol=1.6)
        assert moved.dtype == np.float32 and moved[0, 0] == 0
        assert (moved[0, 1:] >= 0).all() and (moved[0, 1:] <= (220, 180, 220, 180)).all()
    assert checked >= 9
    if values:
        first, second = (augment.random_affine(image, boxes, hyp(**values), (220, 180), np.random.default_rng(seed))[0] for seed in (0, 1))
        assert (first != second).any(), "another seed, another view"


def test_affine_without_motion_centres() -> None:
    image, boxes = painted(100, 80, (10, 20, 40, 50))
    out, moved = augment.random_affine(image, boxes, STILL, (120, 120), np.random.default_rng(0))
    np.testing.assert_array_equal(out, augment.pad(image, centre_in(image.shape[1::-1], image.shape[1::-1], (120, 120)), (120, 120)))
    np.testing.assert_allclose(moved, boxes + np.array((0, 10, 20, 10, 20)))


def test_what_leaves_the_picture_is_dropped() -> None:
    """The middle 100 x 100 of 200 x 200 is kept: one box inside, one of which 8 % stay, one of which a third stays, one gone, one a sliver."""
    boxes = np.array([[0, 60, 60, 90, 90], [1, 4, 60, 54, 110], [2, 20, 60, 65, 110], [3, 5, 5, 40, 40], [4, 60, 60, 100, 61.5]], np.float32)
    _, kept = augment.random_affine(np.zeros((200, 200, 3), np.uint8), boxes, STILL, (100, 100), np.random.default_rng(0))
    np.testing.assert_allclose(kept, [[0, 10, 10, 40, 40], [2, 0, 10, 15, 60]])


def test_affine_without_boxes() -> None:
    empty = np.zeros((50, 60, 3), np.uint8), np.zeros((0, 5), np.float32)
    image, boxes = augment.random_affine(*empty, hyp(degrees=10), (64, 64), np.random.default_rng(0))
    assert image.shape == (64, 64, 3) and boxes.shape == (0, 5)


def test_strong_perspective_drops_boxes_behind_the_viewer() -> None:
    """At 0.001 and 1280 pixels the picture's corners may pass behind the viewer: a box there has no place in the result."""
    corners = np.array([[0, 0], [1190, 0], [0, 1190], [1190, 1190], [600, 600]])
    boxes = np.concatenate((np.arange(5)[:, None], corners, corners + 90), 1).astype(np.float32)
    strong, image, behind = hyp(perspective=0.001), np.zeros((1280, 1280, 3), np.uint8), 0
    for seed in range(60):
        _, kept = augment.random_affine(image, boxes, strong, (640, 640), np.random.default_rng(seed))
        px, py = np.random.default_rng(seed).uniform(-0.001, 0.001, 2)
        depth = 1 + (boxes[:, [1, 3]] - 640) * px, 1 + (boxes[:, [2, 4]] - 640) * py
        ahead = np.flatnonzero(depth[0].min(1) + depth[1].min(1) - 1 > 0)
        assert set(kept[:, 0].astype(int)) <= set(ahead) and 4 in kept[:, 0]
        behind += 5 - len(ahead)
    assert behind >= 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"flipud": 1}, (10, 30, 40, 60)), ({"fliplr": 1}, (60, 20, 90, 50)), ({"flipud": 1, "fliplr": 1}, (60, 30, 90, 60))],
)
def test_flips_by_hand(values: dict[str, float], expected: tuple) -> None:
    image, boxes = painted(100, 80, (10, 20, 40, 50), cls=3)
    out, moved = augment.random_flip(image, boxes, hyp(**values), np.random.default_rng(0))
    np.testing.assert_array_equal(moved, [[3, *expected]])
    np.testing.assert_array_equal(found(out), expected)
    empty = augment.random_flip(image, boxes[:0], hyp(**values), np.random.default_rng(0))[1]
    assert empty.shape == (0, 5)


def test_flip_probability() -> None:
    image, boxes = painted(100, 80, (10, 20, 40, 50))
    flipped = sum(augment.random_flip(image, boxes, hyp(fliplr=0.3), np.random.default_rng(n))[1][0, 1] == 60 for n in range(400))
    assert 90 < flipped < 150
    assert augment.random_flip(image, boxes, STILL, np.random.default_rng(0))[0] is image


def test_hsv_gains_of_zero_change_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(augment.random_hsv(image, STILL, np.random.default_rng(0)), image)


class Fixed:
    """A generator whose every uniform number is the given one."""

    def __init__(self, *values: float) -> None:
        self.values = np.array(values)

    def uniform(self, low: float, high: float, count: int) -> np.ndarray:
        return self.values[:count]


def test_hsv_by_hand() -> None:
    """Brightness gain 1 + 1 * 0.4 on grey 100; saturation 1 - 0.5 on pure red; hue 1 + 0.5 turns green (60 of 180) to 90, cyan-ish."""
    grey = np.full((2, 2, 3), 100, np.uint8)
    assert (augment.random_hsv(grey, hyp(hsv_v=0.4), Fixed(0, 0, 1)) == 140).all()
    red = np.zeros((2, 2, 3), np.uint8) + np.array([0, 0, 200], np.uint8)
    np.testing.assert_allclose(augment.random_hsv(red, hyp(hsv_s=0.5), Fixed(0, -1, 0))[0, 0], [100, 100, 200], atol=1)
    green = np.zeros((2, 2, 3), np.uint8) + np.array([0, 200, 0], np.uint8)
    np.testing.assert_allclose(augment.random_hsv(green, hyp(hsv_h=0.5), Fixed(1, 0, 0))[0, 0], [200, 200, 0], atol=1)
    assert (augment.random_hsv(grey, hyp(hsv_v=1.0), Fixed(0, 0, 1)) == 200).all(), "bright values are cut, they don't wrap"
    assert augment.random_hsv(np.full((1, 1, 3), 200, np.uint8), hyp(hsv_v=1.0), Fixed(0, 0, 1)).tolist() == [[[255, 255, 255]]]


def test_mosaic_places_four_images_around_a_point() -> None:
    """Each image has one painted box of its own colour; each box is found where the mosaic says."""
    colours = [(250, 30, 20), (20, 250, 30), (30, 20, 250), (250, 250, 20)]
    sizes = [(64, 48), (48, 64), (64, 64), (64, 30)]
    for seed in range(6):
        images, boxes = [], []
        for n, (width, height) in enumerate(sizes):
            image = np.full((height, width, 3), 60, np.uint8)
            image[5:25, 10:40] = colours[n]
            images.append(image)
            boxes.append(np.array([[n, 10, 5, 40, 25]], np.float32))
        canvas, joined = augment.mosaic(images, boxes, 64, np.random.default_rng(seed))
        shown = [n for n in range(4) if (canvas == colours[n]).all(2).any()]
        assert canvas.shape == (128, 128, 3) and joined[:, 0].tolist() == shown and len(shown) >= 2  # none of what lies beyond the canvas
        for cls, *corners in joined:
            y, x = np.nonzero((canvas == colours[int(cls)]).all(2))
            np.testing.assert_array_equal(corners, [x.min(), y.min(), x.max() + 1, y.max() + 1])


def test_mosaic_meets_at_its_point() -> None:
    images = [np.full((64, 64, 3), 10 * (n + 1), np.uint8) for n in range(4)]
    canvas, joined = augment.mosaic(images, [np.zeros((0, 5), np.float32)] * 4, 64, np.random.default_rng(0))
    assert joined.shape == (0, 5)
    y, x = np.nonzero(canvas[..., 0] == 40)
    cx, cy = x.min(), y.min()
    assert 32 <= cx < 96 and 32 <= cy < 96
    assert (canvas[cy - 1, cx - 1] == 10).all() and (canvas[cy - 1, cx] == 20).all() and (canvas[cy, cx - 1] == 30).all()
    assert set(np.unique(canvas)) <= {10, 20, 30, 40, 114}


def test_mix_up_blends_pixels_and_joins_boxes() -> None:
    first, second = painted(64, 64, (4, 4, 20, 20), cls=1), painted(64, 64, (40, 40, 60, 60), cls=2)
    image, boxes = augment.mix_up(first, second, np.random.default_rng(0))
    share = np.random.default_rng(0).beta(32, 32)
    np.testing.assert_allclose(image, first[0] * share + second[0] * (1 - share), atol=0.51)
    np.testing.assert_array_equal(boxes, np.concatenate((first[1], second[1])))
    assert 0.25 < share < 0.75


def test_arguments_stay_as_they_are() -> None:
    """Images come from a shared cache: nothing may write to them."""
    everything = Hyp(degrees=20, shear=5, perspective=0.0003, flipud=1, fliplr=1, hsv_v=0.9)
    image, boxes = painted(64, 64, (10, 20, 40, 50))
    image.flags.writeable = boxes.flags.writeable = False
    rng = np.random.default_rng(0)
    augment.mosaic([image] * 4, [boxes] * 4, 64, rng)
    augment.random_affine(image, boxes, everything, (64, 64), rng)
    augment.random_flip(image, boxes, everything, rng)
    augment.random_hsv(image, everything, rng)
    augment.mix_up((image, boxes), (image, boxes), rng)
    augment.letterbox(image, (64, 64), 32)
    assert cv2.countNonZero(image[..., 0]) == 64 * 64
