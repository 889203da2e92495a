"""Label text files, one an image: YOLO's `class cx cy w h` and VisDrone's comma lists. Many files are parsed at once, doubtful ones exactly."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from utils.data.formats import LabelSource, RawLabels, images_of

_CHUNK = 1024  # files parsed together
_MAX_DIGITS = 15
_BUFFER = 8192  # bytes; a longer label file is read in full by a second call
_READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_VISDRONE_CLASSES = 10  # 0 are ignored regions, 1-10 the classes, 11 others

Row = tuple[float, float, float, float, float]
LineParser = Callable[[str], Row | None]  # raises ValueError in words; None: a line that holds no box


def yolo_source(places: Sequence[Path], root: Path, names: tuple[str, ...], yaml: Path) -> LabelSource:
    images = images_of(places, root)
    labels = [label_path(image, "labels") for image in images]
    nc = len(names)

    def read() -> RawLabels:
        return _read(images, labels, names, lambda line: parse_yolo_line(line, nc, yaml.name), fast_nc=nc)

    return LabelSource([*images, *labels], read)


def visdrone_source(places: Sequence[Path], root: Path, names: tuple[str, ...], yaml: Path) -> LabelSource:
    images = images_of(places, root)
    labels = [label_path(image, "annotations") for image in images]

    def read() -> RawLabels:
        raw = _read(images, labels, names, parse_visdrone_line, fast_nc=0)
        raw.frames = np.zeros((len(images), 2))
        return raw

    return LabelSource([*images, *labels], read)


def label_path(image: str, folder: str) -> str:
    """`…/images/…/a.jpg` -> `…/labels/…/a.txt`: the last `images` counts; without one the label lies beside its image."""
    head, middle, tail = image.replace(os.sep, "/").rpartition("/images/")
    return os.path.splitext(f"{head}/{folder}/{tail}" if middle else image)[0] + ".txt"


def parse_yolo_line(line: str, nc: int, yaml: str) -> Row:
    """`class cx cy w h`, or `class x1 y1 x2 y2 …`, a polygon of three or more points, taken as its bounding box."""
    words = line.split()
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        hint = " (is the last a confidence? remove it)" if len(words) == 6 else ""
        raise ValueError(f"{len(words)} columns, expected 5: class cx cy w h{hint}")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{line.strip()[:60]!r} is not a row of numbers: class cx cy w h") from None
    if not np.isfinite(numbers).all():
        raise ValueError("not a finite number; give class cx cy w h as fractions of the image's size")
    if numbers[0] < 0 or (len(words) == 5 and min(numbers) < 0):
        raise ValueError("negative number; class counts from 0, cx cy w h are fractions of the image's size from 0 to 1")
    if numbers[0] != int(numbers[0]):
        raise ValueError(f"class {words[0]} is not a whole number")
    if numbers[0] >= nc:
        raise ValueError(f"class {int(numbers[0])}, but {yaml} names {nc} (0 to {nc - 1}); mend the label or add the name")
    if len(words) == 5:
        return tuple(numbers)
    xs, ys = numbers[1::2], numbers[2::2]
    return numbers[0], (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)


def parse_visdrone_line(line: str) -> Row | None:
    """`left,top,width,height,score,category,truncation,occlusion` in pixels; score 0 marks regions and objects to ignore."""
    try:
        x, y, w, h, score, category, *_ = map(int, line.strip().rstrip(",").split(","))
    except ValueError:
        raise ValueError("expected left,top,width,height,score,category,truncation,occlusion as whole numbers") from None
    if w < 0 or h < 0 or category < 0:
        raise ValueError("negative width, height or category")
    if not score or not 1 <= category <= _VISDRONE_CLASSES:
        return None
    return category - 1, x + w / 2, y + h / 2, w, h


def _read(images: list[str], labels: list[str], names: tuple[str, ...], parse: LineParser, fast_nc: int) -> RawLabels:
    """`fast_nc`: classes allowed on the fast path; 0 for files that it can't read."""
    mistakes: list[str] = []
    rows, owners, lines, unlabelled = [], [], [], 0
    for first in range(0, len(labels), _CHUNK):
        texts = [_read_bytes(path, mistakes) for path in labels[first : first + _CHUNK]]
        unlabelled += texts.count(None)
        table, owner, line, doubtful = _parse_together([text or b"" for text in texts], fast_nc)
        for n in doubtful:
            exact, exact_lines = _parse_exactly(labels[first + n], texts[n], parse, mistakes)
            table, line = np.concatenate((table, exact)), np.concatenate((line, exact_lines))
            owner = np.concatenate((owner, np.full(len(exact), n)))
        order = np.argsort(owner, kind="stable") if len(doubtful) else slice(None)
        rows.append(table[order])
        owners.append(owner[order] + first)
        lines.append(line[order])
    owner, line = np.concatenate([np.empty(0, np.int64), *owners]), np.concatenate([np.empty(0, np.int64), *lines])
    return RawLabels(images, np.concatenate([np.empty((0, 5)), *rows]), owner, lambda row: f"{labels[owner[row]]}:{line[row]}", names,
                     tuple(range(len(names))), unlabelled=unlabelled, mistakes=mistakes)


def _read_bytes(path: str, mistakes: list[str]) -> bytes | None:
    """A small file's content, None where there is no file; one that can't be read is a mistake, as its image is no background.

    Made of bare system calls: open() takes twice as long.
    """
    try:
        descriptor = os.open(path, _READ_ONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        mistakes.append(f"{path}: can't be read: {error.strerror}")
        return b""
    try:
        text = os.read(descriptor, _BUFFER)
        while len(text) and len(text) % _BUFFER == 0:
            more = os.read(descriptor, _BUFFER)
            if not more:
                break
            text += more
        return text
    finally:
        os.close(descriptor)


def _parse_together(texts: Sequence[bytes], nc: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows (R, 5), their file (R,), their line (R,) from 1, and the files that need the exact parser (their rows are left out)."""
    blob = b"\n".join(texts) + b"\n"
    codes = np.frombuffer(blob, np.uint8)
    blank = codes <= 32
    edges = np.flatnonzero(np.diff(blank, prepend=True))
    starts, ends = edges[0::2], edges[1::2]  # of words
    line_of_word = np.cumsum(codes == 10, dtype=np.int32)[starts]
    lines_in = np.array([text.count(b"\n") + 1 for text in texts], np.int64)
    words_in_line = np.bincount(line_of_word, minlength=lines_in.sum())
    file_of_line = np.repeat(np.arange(len(texts)), lines_in)

    doubtful = np.zeros(len(texts), bool)
    doubtful[file_of_line[(words_in_line != 0) & (words_in_line != 5)]] = True
    if doubtful.any():  # count the rest again without them
        rest = [b"" if bad else text for text, bad in zip(texts, doubtful, strict=True)]
        table, owner, line, more = _parse_together(rest, nc)
        doubtful[more] = True
        return table, owner, line, np.flatnonzero(doubtful)
    values = _parse_numbers(blob, codes, starts, ends)
    if values is None:
        doubtful[[n for n, text in enumerate(texts) if text]] = True
        return np.empty((0, 5)), np.empty(0, np.int64), np.empty(0, np.int64), np.flatnonzero(doubtful)
    table = values.reshape(-1, 5)
    line = line_of_word[::5]
    owner = file_of_line[line]
    wrong = ~np.isfinite(table).all(1) | (table < 0).any(1) | (table[:, 0] >= nc) | (table[:, 0] != np.floor(table[:, 0]))
    doubtful[owner[wrong]] = True
    keep = ~doubtful[owner]
    first_line = np.cumsum(lines_in) - lines_in
    return table[keep], owner[keep], (line - first_line[owner] + 1)[keep], np.flatnonzero(doubtful)


def _plain_decimals(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """Words of digits with at most one point as float64; None where any word is something else or too long.

    Exactly what float() gives: up to 15 digits are a whole number below 2^53, and dividing it by a power of ten below 1e22 rounds once.
    """
    width = int((ends - starts).max(initial=0))
    if width > _MAX_DIGITS:
        return None
    whole, places = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    pointed = np.zeros(len(starts), bool)
    for k in range(width):  # the k-th character of every word at once
        inside = starts + k < ends
        digit = np.take(codes, starts + k, mode="clip").astype(np.int64) - ord("0")
        point = inside & (digit == ord(".") - ord("0"))
        digits = inside & (digit >= 0) & (digit <= 9)
        if (inside & ~point & ~digits).any() or (point & pointed).any():
            return None
        whole = np.where(digits, whole * 10 + digit, whole)
        places += digits & pointed
        pointed |= point
    if (pointed & (ends - starts == 1)).any():
        return None
    return whole / 10.0**places


def _parse_numbers(blob: bytes, codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """Every word as float64; None where one is no number."""
    values = _plain_decimals(codes, starts, ends)
    if values is None:
        with contextlib.suppress(ValueError):
            values = np.fromiter(map(float, blob.split()), np.float64)
    return values if values is not None and len(values) == len(starts) else None


def _parse_exactly(path: str, text: bytes, parse: LineParser, mistakes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """One file line by line; what is wrong goes to `mistakes` with its line number."""
    rows, numbers = [], []
    for number, line in enumerate(text.decode("utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except (ValueError, OverflowError) as error:
            mistakes.append(f"{path}:{number}: {error}")
            continue
        if row is not None:
            rows.append(row)
            numbers.append(number)
    return np.array(rows, np.float64).reshape(-1, 5), np.array(numbers, np.int64)
