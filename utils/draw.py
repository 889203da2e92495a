"""Boxes and labels drawn on images, and sheets of images. OpenCV 5 writes any script's letters; OpenCV 4 shows `?` beyond ASCII."""
from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import atomic_write

Color = tuple[int, int, int]  # BGR, 0 … 255

# Okabe & Ito, 2008: told apart with any kind of colour vision; their black left out
_OKABE_ITO = (0xD55E00, 0x56B4E9, 0x009E73, 0xF0E442, 0xCC79A7, 0x0072B2, 0xE69F00)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_DARK, _LIGHT = (24, 24, 24), (255, 255, 255)
_GOLDEN = (math.sqrt(5) - 1) / 2


@functools.cache
def palette(i: int) -> Color:
    """The colour of class i: seven that any colour vision tells apart, then hues far from the last ones, in three shades."""
    if i < len(_OKABE_ITO):
        rgb = _OKABE_ITO[i]
        return rgb & 255, rgb >> 8 & 255, rgb >> 16
    saturation, value = ((0.85, 0.95), (0.55, 1.0), (0.9, 0.65))[i % 3]
    r, g, b = colorsys.hsv_to_rgb(i * _GOLDEN % 1, saturation, value)
    return round(255 * b), round(255 * g), round(255 * r)


def draw_boxes(
    image: np.ndarray, xyxy: np.ndarray, labels: Sequence[str], colors: Sequence[Color], line_width: int | None = None
) -> np.ndarray:
    """A copy of the image with boxes and labels; the first box lies on top.

    Args:
        image: (H, W, 3) uint8, BGR.
        xyxy: (n, 4) in its pixels; what lies outside is held at the border.
        labels: n texts; an empty one draws no label.
        line_width: pixels; None: by the image's size. The letters follow it.
    """
    image = np.array(image, order="C")
    height, width = image.shape[:2]
    line_width = max(round(line_width or (height + width) / 500), 1)
    corners = np.clip(np.reshape(xyxy, (-1, 4)), 0, (width - 1, height - 1) * 2).round().astype(int).tolist()
    boxes = list(zip(corners, labels, colors, strict=True))[::-1]
    for (x1, y1, x2, y2), _, color in boxes:
        cv2.rectangle(image, (x1, y1), (x2, y2), color, line_width)
    for (x1, y1, _, _), label, color in boxes:
        if label:
            _draw_label(image, label, x1 - line_width // 2, y1 - line_width // 2, color, 0.25 + 0.13 * line_width)
    return image


def _draw_label(image: np.ndarray, label: str, left: int, bottom: int, color: Color, scale: float) -> None:
    """A filled tab with text, on the box's upper edge if there is room, else below it; inside the image, smaller where it's too narrow."""
    height, width = image.shape[:2]
    label = _printable(label)
    text_w, text_h, base = _text_size(label, scale)
    if text_w > width:
        scale *= width / text_w
        text_w, text_h, base = _text_size(label, scale)
    pad = max(round(text_h / 5), 1)
    tab_w, tab_h = text_w + 2 * pad, text_h + base + pad
    left = max(min(left, width - tab_w), 0)
    top = max(min(bottom - tab_h, height - tab_h), 0)
    cv2.rectangle(image, (left, top), (left + tab_w - 1, top + tab_h - 1), color, -1)
    luminance = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2]
    ink = _DARK if luminance > 130 else _LIGHT
    cv2.putText(image, label, (left + pad, top + text_h + pad // 2 + 1), _FONT, scale, ink, _weight(scale), cv2.LINE_AA)


def _printable(text: str) -> str:
    """Of a file name that is no UTF-8 the bytes that are none become question marks: OpenCV crashes on them."""
    return text.encode("utf-8", "replace").decode("utf-8")


@functools.lru_cache(4096)
def _text_size(text: str, scale: float) -> tuple[int, int, int]:
    """Width, height above and below the base line, pixels; the same height for every text of a scale."""
    (_, height), base = cv2.getTextSize("Ag", _FONT, scale, _weight(scale))
    return cv2.getTextSize(text, _FONT, scale, _weight(scale))[0][0], height, base


def _weight(scale: float) -> int:
    return 1 if scale < 0.75 else 2


class Tile(NamedTuple):
    """One image of a sheet."""

    image: np.ndarray  # (H, W, 3) uint8, BGR
    xyxy: np.ndarray  # (n, 4) in its pixels
    labels: Sequence[str]  # n
    colors: Sequence[Color]  # n
    caption: str = ""


def image_grid(tiles: Sequence[Tile], out: Path, columns: int | None = None, max_tiles: int = 16, max_size: int = 1920) -> None:
    """Write a sheet of images with their boxes and captions, at most `max_size` pixels wide and high; no tiles, no file.

    Args:
        tiles: the first `max_tiles` are shown, row by row. Truth beside prediction: give pairs in turn and an even `columns`.
        columns: None: about as many as rows.
    """
    tiles = tiles[:max_tiles]
    if not tiles:
        return
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    gap, caption = 8, 26
    aspect = np.median([t.image.shape[0] / t.image.shape[1] for t in tiles]).clip(0.4, 2.5)
    cell_w = min((max_size - gap) // columns - gap, round(((max_size - gap) // rows - gap - caption) / aspect), 960)
    cell_h = round(cell_w * aspect)
    pitch_x, pitch_y = cell_w + gap, cell_h + caption + gap
    sheet = np.full((rows * pitch_y + gap, columns * pitch_x + gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        left, top = gap + i % columns * pitch_x, gap + i // columns * pitch_y
        _put_caption(sheet[top : top + caption, left : left + cell_w], tile.caption)
        sheet[top + caption : top + caption + cell_h, left : left + cell_w] = _draw_tile(tile, cell_w, cell_h)
    save_image(out, sheet)


def _draw_tile(tile: Tile, width: int, height: int) -> np.ndarray:
    """The tile scaled into (height, width, 3), boxes drawn after scaling so that lines and letters stay clear."""
    old_h, old_w = tile.image.shape[:2]
    gain = min(width / old_w, height / old_h)
    new_w, new_h = max(round(old_w * gain), 1), max(round(old_h * gain), 1)
    scaled = cv2.resize(tile.image, (new_w, new_h), interpolation=cv2.INTER_AREA if gain < 1 else cv2.INTER_CUBIC)
    boxes = np.reshape(tile.xyxy, (-1, 4)) * ([new_w / old_w, new_h / old_h] * 2)
    cell = np.full((height, width, 3), 235, np.uint8)
    left, top = (width - new_w) // 2, (height - new_h) // 2
    line_width = 2 if min(width, height) >= 240 else 1
    cell[top : top + new_h, left : left + new_w] = draw_boxes(scaled, boxes, tile.labels, tile.colors, line_width)
    return cell


def _put_caption(strip: np.ndarray, text: str) -> None:
    """Dark letters on the white strip, cut with an ellipsis where the text is too long."""
    scale, text = 0.5, _printable(text)
    while len(text) > 1 and _text_size(text, scale)[0] > strip.shape[1]:
        text = text.rstrip("…")[:-1] + "…"
    cv2.putText(strip, text, (2, strip.shape[0] - 8), _FONT, scale, _DARK, 1, cv2.LINE_AA)


def save_image(path: Path, image: np.ndarray) -> None:
    """Write an image, atomically, in the format that the name's suffix says.

    Raises:
        UserError: OpenCV can't write that format.
    """
    try:
        done, encoded = cv2.imencode(Path(path).suffix, image)
    except cv2.error:
        done = False
    if not done:
        raise UserError(f"{path}: can't write images of this kind: name it .jpg or .png")
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.tobytes())
