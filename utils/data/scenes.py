"""Pictures of textured, rotated, overlapping shapes on clutter, each a function of its seed alone.

A class is its outline, with a hint in its colour; texture, light and size are drawn independently of it. Everything is integer arithmetic on
PCG64's raw bits, so that no version of a library, processor or libm changes a pixel.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

NAMES = ("circle", "triangle", "star", "cross")
SIZES = ((256, 256), (256, 192), (192, 256), (256, 224), (224, 256))  # width, height

_PX = 64  # vertices and texture coordinates are in 1/64 pixel
_UNIT = 1024  # radius of the outlines below
_HUES = 6 * 256
_HUE_REACH = 160  # about its class's own hue: a hint, shared by two classes at its ends
_MIN_VISIBLE = 40  # per cent of an object's area; one that is hidden more than this allows gets no label
_MIN_SIDE = 5  # pixels; the shortest side of a labelled box
_COS = [round(4096 * math.cos(math.radians(a))) for a in range(360)]

Item = TypeVar("Item")
Contour = np.ndarray  # (N, 2) int64 x, y
Colour = tuple[int, int, int]


class Scene(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8, BGR
    boxes: np.ndarray  # (N, 4) int64 xyxy, tight around the visible pixels; x2, y2 exclusive
    classes: np.ndarray  # (N,) int64
    masks: np.ndarray  # (N, H, W) bool, the visible pixels


class _Dice:
    """Integer draws. Of numpy's random streams only the bit generators' raw output is promised never to change."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def draw(self, low: int, high: int) -> int:
        """A whole number in low..high, both included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def chance(self, per_cent: int) -> bool:
        return self.draw(0, 99) < per_cent

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.draw(0, len(items) - 1)]

    def bytes(self, *shape: int) -> np.ndarray:
        """A uint8 array of that shape."""
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return raw.view(np.uint8)[:count].reshape(shape)


# Outlines: lists of contours in units of _UNIT, outer ones counter-clockwise, holes clockwise.


def _polar(radii: Sequence[int], turn: int = 0) -> Contour:
    """A contour with its vertices spread evenly over the full turn, from the angle `turn` on."""
    angles = [(turn + 360 * i // len(radii)) % 360 for i in range(len(radii))]
    return np.array([(r * _COS[a] // 4096, r * _COS[(a - 90) % 360] // 4096) for r, a in zip(radii, angles, strict=True)], np.int64)


_CROSS = ((3, 10), (3, 3), (10, 3), (10, -3), (3, -3), (3, -10), (-3, -10), (-3, -3), (-10, -3), (-10, 3), (-3, 3), (-3, 10))
_OUTLINES: dict[str, list[Contour]] = {
    "circle": [_polar([_UNIT] * 40)],
    "square": [_polar([1250] * 4, 45)],
    "triangle": [_polar([1200] * 3, 270)],
    "star": [_polar([1150, 470] * 5, 270)],
    "ring": [_polar([_UNIT] * 40), _polar([560] * 40)[::-1]],
    "cross": [np.array(_CROSS, np.int64)[::-1] * 100],
}
_FRAGMENTS: tuple[list[Contour], ...] = (  # clutter: pieces that look like objects and are none
    [np.array(((-900, -900), (-300, -900), (-300, 400), (900, 400), (900, 900), (-900, 900)), np.int64)],  # an angle
    [np.array(((-1000, -700), (-300, 0), (-1000, 700), (-200, 700), (500, 0), (-200, -700)), np.int64)[::-1]],  # a chevron
    [_polar([_UNIT] * 40)[:21]],  # a half disc
    [np.concatenate((_polar([_UNIT] * 40)[:19], _polar([620] * 40)[18::-1]))],  # an arc
    [np.array(((-1000, -200), (1000, -800), (1000, 800), (-1000, 200)), np.int64)],  # a wedge
    [_polar([1000, 330] * 4)],  # a spark
)


def _blob(dice: _Dice) -> list[Contour]:
    """A lobed puddle: radii that swing between short and long, so that it is no ellipse."""
    knots = [dice.draw(350, 600) if i % 2 else dice.draw(800, 1100) for i in range(8)]
    return [_polar([(knots[i // 5] * (5 - i % 5) + knots[(i // 5 + 1) % 8] * (i % 5)) // 5 for i in range(40)])]


def _place(outline: list[Contour], size_px: tuple[int, int], centre_px: tuple[int, int], angle: int) -> list[Contour]:
    """The outline stretched to about `size_px`, turned by `angle` degrees and moved: vertices in 1/64 pixel."""
    cos, sin = _COS[angle % 360], _COS[(angle - 90) % 360]
    placed = []
    for contour in outline:
        x, y = (contour[:, i] * size_px[i] * _PX // (2 * _UNIT) for i in (0, 1))
        turned = (x * cos - y * sin) // 4096, (x * sin + y * cos) // 4096
        placed.append(np.stack([t + c * _PX for t, c in zip(turned, centre_px, strict=True)], 1))
    return placed


def _area_px(contours: list[Contour]) -> int:
    """Shoelace formula; holes run the other way round and so count negative."""
    twice = sum(int((c[:, 0] * np.roll(c[:, 1], -1) - c[:, 1] * np.roll(c[:, 0], -1)).sum()) for c in contours)
    return abs(twice) // (2 * _PX * _PX)


def _coverage(contours: list[Contour], width: int, height: int) -> np.ndarray:
    """Share of each pixel inside the contours, (height, width), 0..256: exact along x, four sample rows a pixel along y."""
    start = np.concatenate(contours)
    end = np.concatenate([part for c in contours for part in (c[1:], c[:1])])
    rows = np.arange(height * 4) * (_PX // 4) + _PX // 8
    edge, row = np.nonzero((start[:, 1, None] <= rows) != (end[:, 1, None] <= rows))
    (x1, y1), (x2, y2) = start[edge].T, end[edge].T
    x = np.clip(x1 + (rows[row] - y1) * (x2 - x1) // (y2 - y1), 0, width * _PX)
    direction = np.where(y2 > y1, 1, -1)
    pixel = row // 4 * (width + 2) + x // _PX
    here, beyond = direction * (_PX - x % _PX), direction * (x % _PX)  # what changes at each pixel, and at the next, when going right
    steps = np.bincount(np.concatenate((pixel, pixel + 1)), np.concatenate((here, beyond)), height * (width + 2))  # whole numbers, exact in float64
    return np.abs(steps.reshape(height, -1)[:, :width].cumsum(1)).astype(np.int32)


# Surfaces: a pattern mixes two colours, 0..256 for each pixel.


def _wave(u: np.ndarray, period: int) -> np.ndarray:
    """A square wave over u with edges one pixel soft, -128..128."""
    return np.clip(2 * (np.abs(u % (2 * period) - period) - period // 2), -128, 128)


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """x (1, width) and y (height, 1)."""
    return np.arange(width, dtype=np.int32)[None], np.arange(height, dtype=np.int32)[:, None]


def _cloud(dice: _Dice, width: int, height: int, cell: int) -> np.ndarray:
    """Value noise with bumps of about `cell` pixels, (height, width), 0..256."""
    noise = dice.bytes(height // cell + 2, width // cell + 2).astype(np.int32)
    for size in (width, height):  # along x, then, turned over, along y
        whole, part = np.divmod(np.arange(size, dtype=np.int32), cell)
        smooth = part * part * (3 * cell - 2 * part) * 16 // cell**3 * 16
        noise = (noise[:, whole] + ((noise[:, whole + 1] - noise[:, whole]) * smooth >> 8)).T
    return noise


def _pattern(dice: _Dice, width: int, height: int) -> np.ndarray:
    """(height, width), 0..256."""
    x, y = _grid(width, height)
    angle = dice.draw(0, 359)
    cos, sin = _COS[angle], _COS[(angle - 90) % 360]
    side = min(width, height)
    period = dice.draw(3, max(4, min(side // 4, 16))) * _PX
    kind = dice.pick(("plain", "stripes", "checks", "dots", "ramp", "cloud", "cloud"))
    if kind == "plain":
        return np.zeros((height, width), np.int32)
    if kind == "cloud":
        return (_cloud(dice, width, height, max(side // 3, 4)) * 3 + _cloud(dice, width, height, max(side // 12, 2))) >> 2
    u = (x * cos + y * sin) >> 6
    if kind == "stripes":
        return _wave(u, period) + 128
    if kind == "ramp":
        return (u - u.min()) * 256 // max(int(u.max() - u.min()), 1)
    v = (y * cos - x * sin) >> 6
    if kind == "checks":
        return (_wave(u, period) * _wave(v, period) >> 7) + 128
    radius = period * dice.draw(5, 8) // 16  # dots
    squared = (u % (2 * period) - period) ** 2 + (v % (2 * period) - period) ** 2
    return np.clip((radius * radius - squared) * 2 // radius + 128, 0, 256)


def _colour(dice: _Dice, saturation: tuple[int, int], value: tuple[int, int], hue: int | None = None) -> Colour:
    """BGR of the hue (0 … 1535, from red through green and blue), or of a random one."""
    sector, rise = divmod(dice.draw(0, _HUES - 1) if hue is None else hue % _HUES, 256)
    s, v = dice.draw(*saturation), dice.draw(*value)
    low, falling, rising = v * (256 - s) // 256, v * (256 * 256 - s * rise) // 65536, v * (256 * 256 - s * (256 - rise)) // 65536
    return ((low, rising, v), (low, v, falling), (rising, v, low), (v, falling, low), (v, low, rising), (falling, low, v))[sector]


def _near(dice: _Dice, colour: Colour, reach: int) -> Colour:
    return tuple(min(max(c + dice.draw(-reach, reach), 0), 255) for c in colour)


def _surface(dice: _Dice, width: int, height: int, first: Colour, second: Colour) -> np.ndarray:
    """(3, height, width), 0..255: two colours mixed by a pattern."""
    mix = _pattern(dice, width, height)
    a, b = (np.array(c, np.int32)[:, None, None] for c in (first, second))
    return a + (mix * (b - a) >> 8)


class _Canvas:
    """The picture while it is painted, and which layer each pixel shows."""

    def __init__(self, dice: _Dice, width: int, height: int) -> None:
        self.dice, self.width, self.height = dice, width, height
        base = _colour(dice, (10, 70), (60, 210))
        self.pixels = _surface(dice, width, height, base, _near(dice, base, 50))
        self.pixels += (_surface(dice, width, height, (0, 0, 0), (48, 48, 48)) - 24) * dice.draw(0, 256) // 256
        self.owner = np.full((height, width), -1)  # object on top, -1 where there is none

    def paint(self, contours: list[Contour], owner: int = -1, hue: int | None = None) -> None:
        """Lay a textured piece with a soft shadow on top of what is there."""
        dice = self.dice
        points = np.concatenate(contours) // _PX
        margin = 8
        left, top = np.maximum(points.min(0) - margin, 0)
        right, bottom = np.minimum(points.max(0) + margin + 1, (self.width, self.height))
        width, height = int(right - left), int(bottom - top)
        if min(width, height) <= margin:  # outside the picture
            return
        pixels, on_top = self.pixels[:, top:bottom, left:right], self.owner[top:bottom, left:right]
        inside = _coverage([c - np.array((left, top)) * _PX for c in contours], width, height)

        dx, dy = dice.draw(0, 3), dice.draw(1, 4)
        shadow = np.zeros_like(inside)
        shadow[dy:, dx:] = inside[: height - dy, : width - dx]
        shadow = _blur(shadow, (1, 2)) * dice.draw(40, 120) >> 8
        first = _colour(dice, (120, 240), (110, 250), hue)
        second = _near(dice, first, 70) if dice.chance(65) else _colour(dice, (60, 240), (60, 250), hue)
        x, y = _grid(width, height)
        light = 276 - (x * 256 // width + y * 256 // height) * 40 // 256  # as if lit from the upper left
        piece = np.minimum(_surface(dice, width, height, first, second) * light >> 8, 255)
        ground = pixels * (256 - shadow) >> 8
        pixels[:] = ground + ((piece - ground) * inside >> 8)
        on_top[inside >= 128] = owner

    def clutter(self, most: int) -> None:
        """Blobs, fragments and long thin lines that are no objects."""
        dice = self.dice
        for _ in range(dice.draw(0, most)):
            centre, angle = (dice.draw(0, self.width), dice.draw(0, self.height)), dice.draw(0, 359)
            kind = dice.pick(("line", "line", "blob", "fragment", "fragment"))
            side = dice.draw(10, 60)
            if kind == "line":
                square = _OUTLINES["square"]
                self.paint(_place(square, (dice.draw(40, 300), dice.draw(1, 5)), centre, angle))
            else:
                outline = _blob(dice) if kind == "blob" else dice.pick(_FRAGMENTS)
                self.paint(_place(outline, (side, side * dice.draw(50, 100) // 100), centre, angle))

    def finished(self) -> np.ndarray:
        """Light, blur and noise of a camera; (H, W, 3) uint8."""
        dice = self.dice
        x, y = _grid(self.width, self.height)
        towards = x * dice.draw(-60, 60) // self.width + y * dice.draw(-60, 60) // self.height
        pixels = (self.pixels * (dice.draw(190, 290) + towards) >> 8) + dice.draw(-15, 20)
        pixels = _blur(pixels, dice.pick(((), (), (), (), (1,), (1, 1))))
        noise = sum(b.astype(np.int32) for b in dice.bytes(4, 3, self.height, self.width)) - 510  # near to normal, deviation 148
        return np.clip(pixels + (noise * dice.draw(1, 8) >> 7), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _blur(image: np.ndarray, reaches: Sequence[int]) -> np.ndarray:
    """Filters 1 2 1 over the last two axes, one after another, each taking neighbours at its reach; the border stays."""
    for r in reaches:
        image = image.copy()
        image[..., r:-r, :] = (image[..., : -2 * r, :] + 2 * image[..., r:-r, :] + image[..., 2 * r :, :] + 2) >> 2
        image[..., r:-r] = (image[..., : -2 * r] + 2 * image[..., r:-r] + image[..., 2 * r :] + 2) >> 2
    return image


def _side_px(dice: _Dice, longest: int) -> int:
    """An object's size: mostly a fifth of the image, with small and large ones among them."""
    low = dice.pick((10, 20, 36, 36, 36, 36, 36, 48, 64, 80))
    return dice.draw(low, min(low * 3 // 2, longest // 2))


def render(seed: int) -> Scene:
    """One picture with its truth: a function of the seed alone."""
    dice = _Dice(seed)
    width, height = dice.pick(SIZES)
    canvas = _Canvas(dice, width, height)
    canvas.clutter(3)
    count = 0 if dice.chance(3) else dice.draw(6, 16)
    sides = sorted((_side_px(dice, max(width, height)) for _ in range(count)), reverse=True)  # small ones lie on top of large ones
    classes, areas, centre = [], [], (width // 2, height // 2)
    for side in sides:
        beside = classes and dice.chance(15)  # and partly over the one before
        centre = tuple(c + dice.draw(-side, side) for c in centre) if beside else (dice.draw(0, width), dice.draw(0, height))
        name = dice.draw(0, len(NAMES) - 1)
        contours = _place(_OUTLINES[NAMES[name]], (side, side * dice.draw(80, 100) // 100), centre, dice.draw(0, 359))
        hue = name * _HUES // len(NAMES) + dice.draw(-_HUE_REACH, _HUE_REACH)
        canvas.paint(contours, len(classes), hue if dice.chance(80) else None)
        classes.append(name)
        areas.append(_area_px(contours))
    canvas.clutter(2)
    return _truth(canvas.finished(), canvas.owner, classes, areas)


def _truth(image: np.ndarray, owner: np.ndarray, classes: list[int], areas: list[int]) -> Scene:
    """Tight boxes around what is visible of each object, without those that are hidden or cut off too far."""
    masks, boxes, kept = [], [], []
    for i, (name, area) in enumerate(zip(classes, areas, strict=True)):
        mask = owner == i
        visible = np.count_nonzero(mask)
        if not visible or 100 * visible < _MIN_VISIBLE * area:
            continue
        x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box = x[0], y[0], x[-1] + 1, y[-1] + 1
        if min(box[2] - box[0], box[3] - box[1]) >= _MIN_SIDE:
            masks.append(mask)
            boxes.append(box)
            kept.append(name)
    xyxy, stacked = np.array(boxes, np.int64).reshape(-1, 4), np.array(masks, bool).reshape(-1, *owner.shape)
    return Scene(np.ascontiguousarray(image), xyxy, np.array(kept, np.int64), stacked)
