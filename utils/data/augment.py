"""Augmentations as functions of an image, its boxes and a random generator.

Images are (H, W, 3) uint8 BGR; boxes (n, 5) class, x1, y1, x2, y2 in pixels.
"""
from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.random import Generator

from utils.boxes import Letterbox, centre_in, clip_xyxy, fitted
from utils.hyp import Hyp

GREY = 114  # the padding that YOLO networks are trained with
_MIN_SIDE_PX = 2  # a box that an augmentation leaves smaller is dropped,
_MIN_AREA_SHARE = 0.1  # likewise one that lost more of its area,
_MAX_ASPECT = 100  # or became a sliver


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To `size` (width, height): area averaging where it shrinks, bilinear where it grows."""
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    shrinks = size[0] * size[1] < width * height
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def pad(image: np.ndarray, place: Letterbox, target: tuple[int, int]) -> np.ndarray:
    """Lay a scaled image into grey of `target` (width, height), where `place` says."""
    bottom, right = target[1] - image.shape[0] - place.top, target[0] - image.shape[1] - place.left
    return cv2.copyMakeBorder(image, place.top, bottom, place.left, right, cv2.BORDER_CONSTANT, value=(GREY,) * 3)


def letterbox(image: np.ndarray, imgsz: tuple[int, int], stride: int | None) -> tuple[np.ndarray, Letterbox]:
    """Fit an image into `imgsz` (height, width), its aspect kept, and pad each side to the next multiple of `stride`; to `imgsz` itself if None.

    Bilinear, whichever way it scales, unlike `resize`: published figures of detection come from bilinear images, those of validation from averaged
    ones, and the other filter moves boxes by up to 10 px.
    """
    height, width = image.shape[:2]
    scaled = fitted((width, height), imgsz)
    target = (math.ceil(scaled[0] / stride) * stride, math.ceil(scaled[1] / stride) * stride) if stride else (imgsz[1], imgsz[0])
    resized = image if scaled == (width, height) else cv2.resize(image, scaled, interpolation=cv2.INTER_LINEAR)
    place = centre_in((width, height), scaled, target)
    return pad(resized, place, target), place


def mosaic(images: list[np.ndarray], boxes: list[np.ndarray], imgsz: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Four images around a random point of a (2 imgsz, 2 imgsz) canvas (Bochkovskiy et al., YOLOv4, section 3.3)."""
    canvas = np.full((2 * imgsz, 2 * imgsz, 3), GREY, np.uint8)
    centre_x, centre_y = (int(v) for v in rng.uniform(imgsz // 2, 3 * imgsz // 2, 2))
    placed = []
    for n, (image, own) in enumerate(zip(images, boxes, strict=True)):
        height, width = image.shape[:2]
        left = centre_x - width if n % 2 == 0 else centre_x
        top = centre_y - height if n < 2 else centre_y
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, 2 * imgsz), min(top + height, 2 * imgsz)
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
        placed.append(own + np.array((0, left, top, left, top), np.float32))
    joined = np.concatenate(placed)
    joined[:, 1:] = clip_xyxy(joined[:, 1:], 2 * imgsz, 2 * imgsz)
    return canvas, joined[(joined[:, 3:] > joined[:, 1:3]).all(1)]  # what lies beyond the canvas is a line now, which a turn would make a box


def random_affine(image: np.ndarray, boxes: np.ndarray, hyp: Hyp, out: tuple[int, int], rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random zoom, rotation, shear, shift and perspective about the centre; the middle `out` (width, height) of the result is kept."""
    matrix = _random_matrix(image.shape[1], image.shape[0], hyp, out, rng)
    if hyp.perspective:
        image = cv2.warpPerspective(image, matrix, out, borderValue=(GREY,) * 3)
    else:
        image = cv2.warpAffine(image, matrix[:2], out, borderValue=(GREY,) * 3)
    if not len(boxes):
        return image, boxes

    corners = boxes[:, [1, 2, 3, 4, 1, 4, 3, 2]].reshape(-1, 2)
    moved = np.concatenate((corners, np.ones((len(corners), 1), np.float32)), 1) @ matrix.T
    ahead = (moved[:, 2] > 0).reshape(-1, 4).all(1)  # a strong perspective puts corners behind the viewer
    moved = (moved[:, :2] / moved[:, 2:]).reshape(-1, 4, 2)
    whole = np.concatenate((moved.min(1), moved.max(1)), 1)
    kept = clip_xyxy(whole, *out)
    zoom2 = abs(np.linalg.det(matrix[:2, :2]))
    before = zoom2 * (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
    width, height = kept[:, 2] - kept[:, 0], kept[:, 3] - kept[:, 1]
    aspect = np.maximum(width / (height + 1e-9), height / (width + 1e-9))
    large = (width > _MIN_SIDE_PX) & (height > _MIN_SIDE_PX) & (width * height > _MIN_AREA_SHARE * before)
    good = ahead & large & (aspect < _MAX_ASPECT)
    return image, np.concatenate((boxes[good, :1], kept[good].astype(np.float32)), 1)


def _random_matrix(width: int, height: int, hyp: Hyp, out: tuple[int, int], rng: Generator) -> np.ndarray:
    """(3, 3) from input to output pixels: to the centre, perspective, rotation and zoom, shear, shift."""
    px, py = rng.uniform(-hyp.perspective, hyp.perspective, 2)
    angle = math.radians(rng.uniform(-hyp.degrees, hyp.degrees))
    zoom = rng.uniform(1 - hyp.scale, 1 + hyp.scale)
    shear_x, shear_y = (math.tan(math.radians(v)) for v in rng.uniform(-hyp.shear, hyp.shear, 2))
    shift_x, shift_y = rng.uniform(0.5 - hyp.translate, 0.5 + hyp.translate, 2) * out
    centre = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    perspective = np.array([[1, 0, 0], [0, 1, 0], [px, py, 1]])
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    shear = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    shift = np.array([[1, 0, shift_x], [0, 1, shift_y], [0, 0, 1]])
    return shift @ shear @ rotation @ perspective @ centre


def random_hsv(image: np.ndarray, hyp: Hyp, rng: Generator) -> np.ndarray:
    """Hue turned, saturation and brightness scaled by random gains."""
    if not (hyp.hsv_h or hyp.hsv_s or hyp.hsv_v):
        return image
    gains = rng.uniform(-1, 1, 3) * (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v) + 1
    levels = np.arange(256)
    tables = np.stack((levels * gains[0] % 180, np.clip(levels * gains[1], 0, 255), np.clip(levels * gains[2], 0, 255)), -1).astype(np.uint8)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), tables[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def random_flip(image: np.ndarray, boxes: np.ndarray, hyp: Hyp, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Up-down and left-right flips, each with its probability."""
    height, width = image.shape[:2]
    up_down, left_right = rng.random(2) < (hyp.flipud, hyp.fliplr)
    if up_down:
        image, boxes = image[::-1], np.stack((boxes[:, 0], boxes[:, 1], height - boxes[:, 4], boxes[:, 3], height - boxes[:, 2]), 1)
    if left_right:
        image, boxes = image[:, ::-1], np.stack((boxes[:, 0], width - boxes[:, 3], boxes[:, 2], width - boxes[:, 1], boxes[:, 4]), 1)
    return image, boxes


def mix_up(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A blend of two images of one size with the boxes of both (Zhang et al., 2018; Beta(32, 32): nearly halves)."""
    share = rng.beta(32, 32)
    image = cv2.addWeighted(first[0], share, second[0], 1 - share, 0)
    return image, np.concatenate((first[1], second[1]))
