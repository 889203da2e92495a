"""Finding, reading and writing files: every search says where it looked, every write that matters is atomic."""
from __future__ import annotations

import difflib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def find_file(name: str | Path, folders: Iterable[Path], what: str) -> Path:
    """The first existing file among `name` itself and `folders / name`.

    Raises:
        UserError: none exists; the line lists every place tried and the nearest names there.
    """
    tried = [Path(name).expanduser()]
    tried += [folder / name for folder in folders if not tried[0].is_absolute()]
    for path in tried:
        if path.is_file():
            return path
    known = {p.name for t in tried if t.parent.is_dir() for p in t.parent.glob(f"*{Path(name).suffix}")}
    raise UserError(f"{name}: no such {what}; looked at {', '.join(map(str, tried))}{did_you_mean(Path(name).name, known)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean A or B?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(word), sorted(map(str, known)), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping; plain data only.

    Raises:
        UserError: unreadable, not YAML (with the line), or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="strict"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as text: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {type(content).__name__}")
    return content


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:  # a rename may reach the disk before the bytes do
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_writable(path: Path) -> bool:
    """Whether `path`, or the nearest folder above that exists, may be written to. A folder without a write bit is left alone even by root."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return bool(existing.stat().st_mode & 0o222) and os.access(existing, os.W_OK)


def new_run_dir(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """Create and return `project/name`, or the first free of `name2`, `name3`… unless `exist_ok`."""
    base = Path(project).expanduser() / name
    path, n = base, 1
    while True:
        try:
            path.mkdir(parents=True, exist_ok=exist_ok)
            return path
        except FileExistsError:
            if exist_ok:
                raise
            n += 1
            path = base.with_name(f"{name}{n}")

