"""Finding, reading and writing files: every search says where it looked, every write that matters is atomic."""
from __future__ import annotations

import csv
import difflib
import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]
MODEL_FOLDERS = tuple(ROOT / "models" / folder for folder in ("", "hub", "timm"))
_SHORT = 40  # characters of a name within a temporary one, which must fit into 255 bytes too
_MOST_BYTES, _MOST_VALUES, _DEEPEST = 1 << 18, 100_000, 50  # of a YAML file


def find_file(name: str | Path, folders: Iterable[Path], what: str) -> Path:
    """The first existing file among `name` itself and `folders / name`; else the only one there whose name differs in its capitals alone.

    Raises:
        UserError: none exists; the line lists every place tried and the nearest names there.
    """
    tried, folders = [Path(os.path.expanduser(name))], list(folders)
    tried += [folder / name for folder in folders if not tried[0].is_absolute()]
    for path in tried:
        if os.path.isfile(path):  # unlike Path.is_file, also False for a name that no file can have
            return path
    for path in tried:
        alike = [entry for entry in _entries(path.parent) if entry.casefold() == path.name.casefold()]
        if len(alike) == 1 and os.path.isfile(path.with_name(alike[0])):
            return path.with_name(alike[0])
    suffixes = {tried[0].suffix} if tried[0].suffix else {"", ".yaml"}  # which is easily forgotten
    known = {entry for path in tried for entry in _entries(path.parent) if Path(entry).suffix in suffixes}
    if any(folder != ROOT and os.path.isfile(folder / tried[0].name) for folder in folders):
        known.add(tried[0].name)  # of ours: it needs no folder
    raise UserError(f"{name}: no such {what}; looked at {', '.join(map(str, tried))}{did_you_mean(tried[0].name, known)}")


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):
        return []


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean A or B?`, or nothing where no known name is near."""
    names = {name.casefold(): name for name in sorted(map(str, known))}
    near = [names[name] for name in difflib.get_close_matches(str(word).casefold(), names, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


class _Loader(yaml.SafeLoader):
    """Plain data only, and none of what SafeLoader lets pass: a key twice, aliases that multiply, text that its tag does not fit."""

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None:
            _measure(root, {})
        return root

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 63:
                raise OverflowError
            if isinstance(value, str) and not value.isascii():  # JSON writes what lies beyond 16 bits as a pair; half of one is no text
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            return value
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise yaml.MarkedYAMLError(problem=f"'{node.value}' is no {node.tag.rpartition(':')[2]}", problem_mark=node.start_mark) from None


def _measure(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """Values below a node with every alias written out, and how deep they lie."""
    if node in known:
        return known[node]
    known[node] = _MOST_VALUES, 0  # an alias to what is not yet complete contains itself: endless
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is there twice", problem_mark=key.start_mark)
            keys.add((key.tag, key.value if isinstance(key, yaml.ScalarNode) else key))
            children += [key, value]
    sizes = [_measure(child, known) for child in children]
    count, depth = 1 + sum(size[0] for size in sizes), 1 + max((size[1] for size in sizes), default=0)
    if count > _MOST_VALUES or depth > _DEEPEST:
        raise yaml.MarkedYAMLError(problem=f"over {_MOST_VALUES} values or nested deeper than {_DEEPEST}, with every *alias written out",
                                   problem_mark=node.start_mark)
    known[node] = count, depth
    return known[node]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping; plain data only.

    Raises:
        UserError: unreadable, not YAML (with the line), or not a mapping.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes are no settings file: is it another kind of file?")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except RecursionError:
        raise UserError(f"{path}: nested deeper than {_DEEPEST}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as text: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {type(content).__name__}")
    return content


def is_text(name: str) -> bool:
    """A file's name may be any bytes; one that is no UTF-8 makes libraries in C++ crash."""
    try:
        name.encode()
        return True
    except UnicodeEncodeError:
        return False


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A spreadsheet, whole or not at all."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:_SHORT]}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # a rename may reach the disk before the bytes do; Windows syncs what is open to write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a write that fails, on a full disk say, names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place, and that of a folder before it, only when the block ends well."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "a file is there, where a folder is to be written", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, before = (path.with_name(f".{path.stem[:_SHORT]}.{uuid.uuid4().hex}{path.suffix}") for _ in range(2))
    temporary.mkdir()
    try:
        yield temporary
        for inside in _files_in(temporary):
            with open(inside, "r+b") as file:
                os.fsync(file.fileno())
        if path.exists():
            path.rename(before)
        temporary.rename(path)
    finally:
        if before.exists() and not path.exists():  # interrupted between the two renames
            before.rename(path)
        for folder in (temporary, before):
            shutil.rmtree(folder, ignore_errors=True)


def size_bytes(path: Path) -> int:
    """Of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (_files_in(path) if path.is_dir() else (path,)))


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Of all processes that ask so, one at a time has the folder; where the system can't tell, each has.

    Raises:
        UserError: another has it.
    """
    descriptor = _lock(folder)
    if descriptor is None:
        raise UserError(f"{folder}: another process writes there now: wait for its end, or name another folder")
    try:
        yield
    finally:
        _let_go(descriptor)


def has_writer(folder: Path) -> bool:
    descriptor = _lock(folder)
    if descriptor is not None:
        _let_go(descriptor)
    return descriptor is None


def _lock(folder: Path) -> int | None:
    """What holds the folder until it is closed; None where another does."""
    descriptor = os.open(folder if fcntl else os.devnull, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    _held.add(descriptor)
    return descriptor


def _let_go(descriptor: int) -> None:
    _held.remove(descriptor)
    if fcntl:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _close_in_child() -> None:
    """A child that outlives us, such as a loader's worker, would hold the folder on."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


_held: set[int] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def remove_leftovers(folder: Path) -> None:
    """Delete what atomic writes that were killed left in `folder`, where nothing writes now."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 32}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_writable(path: Path) -> bool:
    """Whether `path`, or the nearest folder above that exists, may be written to. A folder without a write bit is left alone even by root."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return bool(existing.stat().st_mode & 0o222) and os.access(existing, os.W_OK)


@contextmanager
def discarded_if_refused(folder: Path, prepared: Collection[str]) -> Iterator[None]:
    """A mistake that shows only within leaves no folder behind, unless it holds more than what was `prepared`, by name.

    Several processes may do so at once.
    """
    try:
        yield
    except UserError:
        if {path.name for path in folder.glob("*")} <= {*prepared}:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def new_run_dir(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """Create and return `project/name`, or the first free of `name2`, `name3`… unless `exist_ok`."""
    base = Path(os.path.expanduser(project)) / name
    base.parent.mkdir(parents=True, exist_ok=True)  # a link to nowhere is no reason to try the next name
    path, n = base, 1
    while True:
        try:
            path.mkdir(exist_ok=exist_ok)
            return path
        except FileExistsError:
            if exist_ok:
                raise
            n += 1
            path = base.with_name(f"{base.name}{n}")

