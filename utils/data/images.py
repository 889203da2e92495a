"""Image files to pixels and sizes, as a viewer shows them. One parse of the header decides size and orientation for both."""
from __future__ import annotations

import io
import os
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES: frozenset[str] = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"})

_HEAD_BYTES = 4096  # holds the header of most files; the rest are read whole
_TAIL_BYTES = 16
_MOST_PIXELS = 178_956_970  # that Pillow reads
_16_BITS_AS_32 = {"PNG", "PPM"}  # formats of 16 bits whose pixels Pillow may give as 32
_32_BITS = "pixels of 32 bits: save it with 8 or 16 bits"
_READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_NO_SIZE_MARKERS = {0xC4, 0xC8, 0xCC}  # in the range of the frame headers C0-CF, but tables
_REDUCED = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


class ImageError(Exception):
    """A file that is broken, truncated or of an unsupported kind; one line that names it."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class _Header(NamedTuple):
    width: int  # as stored
    height: int
    orientation: int  # EXIF, 1..8
    plain: bool  # OpenCV's decoder shows it right: 8-bit grey or colour, no transparency

    @property
    def shown(self) -> tuple[int, int]:
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_image(path: str | os.PathLike[str], reduce: int = 1) -> np.ndarray:
    """(H, W, 3) uint8 BGR as a viewer shows it.

    EXIF orientation is applied, grey and palette become colour, transparency lies on white, 16-bit keeps its high byte, CMYK becomes RGB;
    of several frames the first counts.

    Args:
        reduce: 1, 2, 4 or 8: a JPEG is decoded straight to `ceil(size / reduce)`, at a scale of exactly 1 / reduce (a last row or column may lie
            partly outside the image); other formats come in full size.

    Raises:
        ImageError: missing, broken, truncated or unsupported.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None
    try:
        header = _parse(data, complete=True)
        if header.plain and _ends_well(data[:_TAIL_BYTES], data[-_TAIL_BYTES:], len(data)):
            scale = _REDUCED[reduce if data[:2] == _JPEG else 1]
            image = cv2.imdecode(np.frombuffer(data, np.uint8), scale | cv2.IMREAD_IGNORE_ORIENTATION)
            if image is None:
                raise ValueError("can't be decoded")
        else:
            image = _decode_with_pillow(data, reduce)
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise ImageError(f"{path}: {_reason(error)}") from None
    return _upright(image, header.orientation)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) as shown, from the header alone.

    Raises:
        ImageError: missing, or no image that can be read.
    """
    return _read_ends(path)[0].shown


def check_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """`image_size` of a file that is not cut off: it ends as its format ends, or decodes whole where its end leaves a doubt.

    Raises:
        ImageError: missing, broken, truncated or unsupported.
    """
    header, whole = _read_ends(path)
    width, height = header.shown
    if not header.plain and width * height > _MOST_PIXELS:
        raise ImageError(f"{path}: {width}x{height} pixels of its kind are more than can be read: cut it in tiles, or make it smaller")
    if not whole:
        read_image(path)
    return header.shown


def _read_ends(path: str | os.PathLike[str]) -> tuple[_Header, bool]:
    """The parsed header, and whether the file ends as it should."""
    try:
        descriptor = os.open(path, _READ_ONLY)  # half the time of open(): a scan of many files is made of these calls
        try:
            head = tail = os.read(descriptor, _HEAD_BYTES)
            size = len(head)
            if size == _HEAD_BYTES:
                size = os.lseek(descriptor, -_TAIL_BYTES, os.SEEK_END) + _TAIL_BYTES
                tail = os.read(descriptor, _TAIL_BYTES)
            header = _parse(head, complete=False)
        finally:
            os.close(descriptor)
        if header is None:
            with open(path, "rb") as file:
                header = _parse(file.read(), complete=True)
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise ImageError(f"{path}: {_reason(error)}") from None
    return header, _ends_well(head, tail, size)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError) or not str(error):
        return "not an image of a known format"
    return getattr(error, "strerror", None) or str(error)


def _ends_well(head: bytes, tail: bytes, size: int) -> bool:
    """A cheap sign of wholeness. The end markers can't occur inside compressed data; formats without one are trusted."""
    tail = tail[-_TAIL_BYTES:]
    if head[:2] == _JPEG:
        return b"\xff\xd9" in tail
    if head[:8] == _PNG:
        return b"IEND" in tail
    if head[:2] == b"BM":
        return int.from_bytes(head[2:6], "little") <= size
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return True


def _parse(data: bytes, complete: bool) -> _Header | None:
    """The header in a file's first bytes; None where more of an incomplete file is needed. Raises on anything broken."""
    if data[:2] == _JPEG:
        header = _parse_jpeg(data)
    elif data[:8] == _PNG:
        header = _parse_png(data)
    elif not complete and len(data) == _HEAD_BYTES:
        return None
    else:
        return _parse_with_pillow(data)
    if header is None and (complete or len(data) < _HEAD_BYTES):
        raise ValueError("truncated: its header is cut off")
    if header is not None and not (header.width and header.height):
        raise ValueError("has no width or no height")
    return header


def _parse_jpeg(data: bytes) -> _Header | None:
    """Walk the segments to the frame header, noting the EXIF orientation on the way."""
    at, orientation = 2, 1
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("broken JPEG header")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in _NO_SIZE_MARKERS:
            height, width, components = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8], data[at + 9]
            return _Header(width, height, orientation, plain=data[at + 4] == 8 and components in (1, 3))
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    return None


def _parse_png(data: bytes) -> _Header | None:
    """IHDR, and of the chunks before the pixels those that change how it is shown."""
    if len(data) < 33:
        return None
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):  # else a damaged size would ask for gigabytes
        raise ValueError("broken PNG header")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    plain, orientation, at = data[24] == 8 and data[25] in (0, 2), 1, 33
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind in (b"IDAT", b"IEND"):
            return _Header(width, height, orientation, plain)
        if kind in (b"tRNS", b"acTL"):
            plain = False
        elif kind == b"eXIf":
            orientation = _exif_orientation(data[at + 8 : at + 8 + length])
        at += 12 + length
    return None


def _parse_with_pillow(data: bytes) -> _Header:
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "TIFF":  # Pillow turns TIFF itself when it loads the pixels
            width, height = int(image.tag_v2[256]), int(image.tag_v2[257])
            turned = image.tag_v2.get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return _Header(height if turned else width, width if turned else height, 1, plain=False)
        orientation = image.getexif().get(_ORIENTATION, 1)
        return _Header(*image.size, orientation if orientation in range(1, 9) else 1, plain=False)


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 (upright) where absent or unreadable, as viewers do."""
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1
    start = int.from_bytes(tiff[4:8], order)
    for n in range(int.from_bytes(tiff[start : start + 2], order)):
        entry = tiff[start + 2 + 12 * n : start + 14 + 12 * n]
        if len(entry) < 12:
            break
        if int.from_bytes(entry[:2], order) == _ORIENTATION:
            value = int.from_bytes(entry[8:10], order)
            return value if 1 <= value <= 8 else 1
    return 1


def _decode_with_pillow(data: bytes, reduce: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return _pixels(image, reduce if image.format in {"JPEG", "MPO"} else 1, image.format)


def pillow_to_bgr(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 BGR of an image that Pillow holds, as `read_image` gives its file.

    Raises:
        ImageError: broken, truncated, or pixels of 32 bits.
    """
    try:
        return _pixels(ImageOps.exif_transpose(image), 1, image.format)
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise ImageError(_reason(error)) from None


def _pixels(image: Image.Image, reduce: int, kind: str | None) -> np.ndarray:
    """(H, W, 3) uint8 BGR, not turned; transparency on white. `kind` is the file's format: a copy of an image has lost it."""
    image.load()
    if image.mode == "F" or (image.mode == "I" and kind not in _16_BITS_AS_32):  # of an unknown range: it might come out black
        raise ValueError(_32_BITS)
    if image.mode.startswith("I"):
        return _grey_to_bgr(np.asarray(image))
    if "transparency" in image.info or image.mode in {"RGBA", "RGBa", "LA", "La", "PA"}:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, "white")
        rgb.paste(rgba, mask=rgba)
    else:
        rgb = image.convert("RGB")
    return cv2.cvtColor(np.asarray(rgb.reduce(reduce) if reduce > 1 else rgb), cv2.COLOR_RGB2BGR)


def _grey_to_bgr(grey: np.ndarray) -> np.ndarray:
    """(H, W) of 16-bit values to their high byte, three times."""
    if grey.min(initial=0) < 0 or grey.max(initial=0) > 65535:
        raise ValueError(_32_BITS)
    return cv2.cvtColor((grey >> 8).astype(np.uint8), cv2.COLOR_GRAY2BGR)


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
