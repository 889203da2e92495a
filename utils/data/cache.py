"""Verified labels on disk, keyed by everything that decides them. No pickle; a file that can't be trusted is as good as none."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import atomic_write, is_writable

_FOLDER = ".light-yolo"
_KEEP = 4  # cache files of one split: several class lists or formats in turn, without piling up


def fingerprint_files(files: Iterable[str], *facts: object, named: bool = True) -> str:
    """A key of the paths, if they are to be `named`, their sizes and times of change, and `facts`. Missing files count as missing."""
    lines = [repr(facts)]
    for path in files:
        try:
            stat = os.stat(path)
            lines.append(f"{path if named else ''}|{stat.st_size}|{stat.st_mtime_ns}")
        except OSError:
            lines.append(path if named else "")
    return hashlib.blake2b("\n".join(lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def cache_file(root: Path, name: str, key: str) -> Path:
    """Beside the data where that can be written, else in the user's cache folder."""
    if is_writable(root):
        folder = root / _FOLDER
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "light-yolo" / hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()
    return folder / f"{name}-{key}.npz"


def load(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Arrays and plain data, or None where there are none or they are damaged."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        return arrays, json.loads(arrays.pop("plain").tobytes())
    except Exception:  # a damaged archive raises nearly anything; the labels are simply read again
        return None


def save(file: Path, arrays: dict[str, np.ndarray], plain: dict[str, Any]) -> None:
    """Write whole or not at all, then drop this split's oldest files. A full or read-only disk costs only the cache."""
    content = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    with contextlib.suppress(OSError):
        with atomic_write(file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, plain=content, **arrays)
        _drop_old(file)


def _drop_old(file: Path) -> None:
    name = file.stem.rpartition("-")[0]
    known = [path for path in file.parent.glob("*.npz") if path.stem.rpartition("-")[0] == name and not path.name.startswith(".")]
    for path in sorted(known, key=lambda p: p.stat().st_mtime_ns)[:-_KEEP]:
        path.unlink(missing_ok=True)


def join(arrays: Sequence[np.ndarray], columns: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Many (n, columns) arrays as one, and their lengths."""
    counts = np.array([len(a) for a in arrays], np.int64)
    return np.concatenate([np.empty((0, columns), np.float32), *arrays]), counts


def split_rows(rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """The way back from `join`."""
    ends = np.cumsum(counts).tolist()
    return tuple(rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)) if ends else ()
