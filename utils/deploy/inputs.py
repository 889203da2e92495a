"""What Python hands a detector, as pixels: files, Pillow's images, arrays, tensors, and lists of these."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from utils.data.images import ImageError, pillow_to_bgr, read_image
from utils.data.sources import is_url
from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_TO_BGR = {
    (1, False): cv2.COLOR_GRAY2BGR, (1, True): cv2.COLOR_GRAY2BGR, (3, True): cv2.COLOR_RGB2BGR,
    (4, False): cv2.COLOR_BGRA2RGBA,  # transparency goes through Pillow
}  # fmt: skip
_ROUNDING = 1e-3  # what a resize may add to a tensor's 0..1


class Picture(NamedTuple):
    """One image, ready for a predictor."""

    path: str  # its file; empty where it came from none
    image: np.ndarray  # (H, W, 3) uint8 BGR


def open_pictures(images: Any, rgb: bool = False) -> Iterator[Picture]:
    """Each image of `images` as pixels, read when it is asked for.

    Grey becomes colour, transparency lies on white, and an EXIF orientation is applied, so that an image means the same in every form.

    Args:
        images: one image, a batch, or an iterable of these, sizes mixed. An image is
            a file's path;
            a Pillow image;
            an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, in OpenCV's order BGR(A), and with one dimension more a batch of them;
            a tensor (C, H, W), or a batch (B, C, H, W), of one, three or four channels, RGB(A); uint8, or float in 0..1.
        rgb: arrays are RGB(A) instead.

    Raises:
        UserError: something in it is no image; the line names its place in the list and what was given.
    """
    if not _is_list(images):
        yield from _pictures(images, "", rgb)
        return
    for index, image in enumerate(images):
        yield from _pictures(image, f"image {index} of the list: ", rgb)


def _is_list(images: Any) -> bool:
    one = isinstance(images, str | bytes | os.PathLike | Image.Image | np.ndarray) or _is_tensor(images)
    return isinstance(images, Iterable) and not one and not hasattr(images, "read")  # an open file gives lines


def _is_tensor(image: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    return torch is not None and isinstance(image, torch.Tensor)


def _pictures(image: Any, place: str, rgb: bool) -> Iterator[Picture]:
    try:
        if isinstance(image, str | os.PathLike):
            yield _from_file(os.fspath(image))
        elif isinstance(image, Image.Image):
            path = getattr(image, "filename", "")
            yield Picture(path if isinstance(path, str) else "", pillow_to_bgr(image))
        elif _is_tensor(image):
            yield from (Picture("", pixels) for pixels in _from_array(_channels_last(image), True, "tensor"))
        elif isinstance(image, np.ndarray):
            yield from (Picture("", pixels) for pixels in _from_array(image, rgb, "array"))
        else:
            raise ImageError(f"{type(image).__name__} is no image: give a path, a Pillow image (of an open file, Image.open makes one), an array or "
                             "a tensor")
    except ImageError as error:
        raise UserError(f"{place}{error}") from None


def _from_file(path: str) -> Picture:
    if is_url(path):
        raise ImageError(f"{path}: nothing is fetched from the network: download it and name the file")
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise ImageError(f"{path}: a folder: name the images in it, as sorted(Path({path!r}).glob('*.jpg')) does")
    return Picture(path, read_image(path))


def _channels_last(tensor: Tensor) -> np.ndarray:
    """(C, H, W) or (B, C, H, W), uint8 or float in 0..1 -> (H, W, C) or (B, H, W, C) uint8."""
    given = _described("tensor", tuple(tensor.shape), tensor.dtype)
    if tensor.dim() not in (3, 4) or tensor.shape[-3] not in (1, 3, 4):
        raise ImageError(f"{given}: tensors are (3, H, W), or a batch (B, 3, H, W), RGB")
    if tensor.is_floating_point():
        tensor = tensor.detach().float()
        low, high = map(float, tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ImageError(f"{given}: its values go from {low:g} to {high:g}, where floats are 0 to 1: divide by 255, or give uint8")
        tensor = tensor.clamp(0, 1).mul(255).round().byte()
    array = tensor.movedim(-3, -1).numpy(force=True)
    if array.dtype != np.uint8:
        raise ImageError(f"{given}: tensors are uint8, or float in 0..1")
    return array


def _from_array(array: np.ndarray, rgb: bool, kind: str) -> Iterator[np.ndarray]:
    """(H, W), (H, W, C) or (B, H, W, C) uint8 -> (H, W, 3) BGR; an array that is so already is given as it is."""
    given = _described(kind, array.shape, array.dtype)
    if array.dtype != np.uint8:
        raise ImageError(f"{given}: arrays are uint8, 0 to 255")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4):
        raise ImageError(f"{given}: arrays are (H, W), (H, W, 3) or (H, W, 4), or a batch of them")
    if not (array.shape[-3] and array.shape[-2]):
        raise ImageError(f"{given}: has no pixels")
    for image in array if array.ndim == 4 else (array,):
        if image.shape[2] == 4 and not image[..., 3].any():  # nothing of it would be seen: the fourth is the padding of a screen's pixels
            image = image[..., :3]
        image = np.ascontiguousarray(image)
        code = _TO_BGR.get((image.shape[2], rgb))
        image = image if code is None else cv2.cvtColor(image, code)
        yield pillow_to_bgr(Image.fromarray(image)) if image.shape[2] == 4 else image


def _described(kind: str, shape: tuple[int, ...], dtype: Any) -> str:
    return f"{kind} of shape {tuple(shape)}, {str(dtype).removeprefix('torch.')}"
