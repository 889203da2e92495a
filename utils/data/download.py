"""Fetch what a data YAML's `download:` names, and nothing else: resumable, checked, unpacked without leaving its folder.

python -m utils.data.download --data coco128.yaml
"""
from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.parse import unquote, urlsplit

from utils.data.spec import DataSpec, Download, load_data_spec
from utils.errors import UserError, script
from utils.files import is_writable
from utils.flags import Parser
from utils.log import info

_TIMEOUT_S = 30
_BLOCK = 1 << 20
_BEGUN = ".unpacking"


class _Member(NamedTuple):
    name: str
    size: int
    kind: str  # file, folder or other
    key: zipfile.ZipInfo | tarfile.TarInfo


def download(spec: DataSpec) -> Path:
    """Fetch and unpack every entry of `download:` below `spec.root`; what is there already stays. Returns the root.

    Raises:
        UserError: nothing to fetch, a server's refusal, a wrong checksum, an archive that would write outside its folder.
    """
    if not spec.download:
        raise UserError(f"{spec.file}: names no download: with URLs; put the data at {spec.root}")
    folders = [Path(os.path.normpath(spec.root / item.to)) for item in spec.download]
    for item, folder in zip(spec.download, folders, strict=True):
        if not folder.is_relative_to(spec.root.parent):
            raise UserError(f"{spec.file}: download: to: {item.to} leaves the folder of the data set; name a folder below {spec.root}")
        if not is_writable(folder):
            raise UserError(f"{folder}: not writable; name another place for data sets with --data-root or YOLO_DATASETS")
    markers = [_marker(item, folder) for item, folder in zip(spec.download, folders, strict=True)]
    if _missing(spec) and all(marker.exists() for marker in markers):
        for marker in markers:  # what was unpacked has been removed
            marker.unlink()
    for item, folder in zip(spec.download, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        _fetch_and_unpack(item, folder)
    if missing := _missing(spec):
        raise UserError(f"{spec.file}: everything is fetched, but {missing} is not in {spec.root}; mend path: or to:")
    return spec.root


def cut_off(spec: DataSpec) -> Path | None:
    """An archive whose unpacking was begun and not ended."""
    marks = (mark for item in spec.download for mark in (spec.root / item.to).glob(f".*{_BEGUN}"))
    return next((mark.with_name(mark.name[1:].removesuffix(_BEGUN)) for mark in marks), None)


def _begun(archive: Path) -> Path:
    """Is there while an archive is being unpacked."""
    return archive.with_name(f".{archive.name}{_BEGUN}")


def _missing(spec: DataSpec) -> str | None:
    """The first split of which nothing is there."""
    return next((f"{split}: {entries[0]}" for split, entries in spec.splits.items()
                 if not any((spec.root / entry).exists() for entry in entries)), None)


def _archive_name(item: Download) -> str:
    name = unquote(PurePosixPath(urlsplit(item.url).path).name)
    if not name or name in {".", ".."} or "/" in name or "\\" in name:
        raise UserError(f"{item.url}: names no file")
    return name


def _marker(item: Download, folder: Path) -> Path:
    """Says that this archive was unpacked there."""
    return folder / f".{_archive_name(item)}.unpacked"


def _fetch_and_unpack(item: Download, folder: Path) -> None:
    name, marker = _archive_name(item), _marker(item, folder)
    archive = folder / name
    if marker.exists():
        info(f"{name}: fetched and unpacked already")
        return
    if not archive.exists():
        _fetch(item.url, archive)
    _verify(item, archive)
    if zipfile.is_zipfile(archive) or tarfile.is_tarfile(archive):
        count = unpack(archive, folder)
        marker.touch()
        archive.unlink()
        info(f"{name}: {count} files unpacked in {folder}")


def _fetch(url: str, file: Path) -> None:
    """Download into `file.part`, going on where an earlier try ended, then rename."""
    part = file.with_name(file.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "light-yolo", **({"Range": f"bytes={start}-"} if start else {})})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            resumed = start > 0 and answer.status == 206
            total = int(answer.headers.get("Content-Length") or 0) + (start if resumed else 0)
            info(f"{file.name}: {'going on' if resumed else 'fetching'}, {total / 1e6:.1f} MB from {url}")
            with open(part, "ab" if resumed else "wb") as stream:
                shutil.copyfileobj(answer, stream, _BLOCK)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:  # 416: nothing lies beyond what is here
            raise UserError(f"{url}: the server says {error.code} {error.reason}") from None
        total = start
        if error.headers.get("Content-Range") != f"bytes */{start}":
            part.unlink()
            raise UserError(f"{url}: what was fetched before does not fit the file there now; it was removed, run the command again") from None
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise UserError(f"{url}: can't be fetched: {getattr(error, 'reason', error)}; run the command again to go on where it stopped") from None
    size = part.stat().st_size
    if total and size != total:
        raise UserError(f"{url}: the connection ended after {size} of {total} bytes; run the command again to go on there")
    os.replace(part, file)


def _verify(item: Download, file: Path) -> None:
    if item.checksum is None:
        return
    kind, expected = item.checksum
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected:
        file.unlink()
        raise UserError(f"{item.url}: {kind} is {digest.hexdigest()}, expected {expected}; the file was removed")


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a zip or tar into `folder`; returns the number of files. Every name is checked before the first byte is written.

    Raises:
        UserError: a name that leads outside, a link or device, a damaged archive, or no room.
    """
    try:
        with _open_archive(archive) as (members, open_member):
            for member in members:
                _check_member(archive, member)
            needed, free = sum(m.size for m in members), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(f"{archive}: needs {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free")
            files = [m for m in members if m.kind == "file"]
            begun = _begun(folder / archive.name)
            begun.touch()
            for member in files:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_member(member) as source, open(target, "wb") as stream:
                    shutil.copyfileobj(source, stream, _BLOCK)
            begun.unlink(missing_ok=True)  # another process may have been as far
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError) as error:
        raise UserError(f"{archive}: damaged archive: {error}; remove it and fetch it again") from None
    return len(files)


@contextmanager
def _open_archive(archive: Path) -> Iterator[tuple[list[_Member], object]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            members = [_Member(i.filename, i.file_size, _zip_kind(i), i) for i in zipped.infolist()]
            yield members, lambda member: zipped.open(member.key)
    else:
        with tarfile.open(archive) as tarred:
            members = [_Member(i.name, i.size, "file" if i.isreg() else "folder" if i.isdir() else "other", i) for i in tarred.getmembers()]
            yield members, lambda member: _tar_stream(tarred, member)


def _zip_kind(item: zipfile.ZipInfo) -> str:
    if stat.S_ISLNK(item.external_attr >> 16):
        return "other"
    return "folder" if item.is_dir() else "file"


def _tar_stream(tarred: tarfile.TarFile, member: _Member) -> IO[bytes]:
    stream = tarred.extractfile(member.key)
    if stream is None:
        raise tarfile.TarError(f"{member.name} has no content")
    return stream


def _check_member(archive: Path, member: _Member) -> None:
    parts = member.name.replace("\\", "/").split("/")
    if member.name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in member.name:
        raise UserError(f"{archive}: refused: {member.name!r} would be written outside its folder; nothing was unpacked")
    if member.kind == "other":
        raise UserError(f"{archive}: refused: {member.name!r} is a link or a device; nothing was unpacked")


@script
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Fetch the data set that a data YAML names.")
    parser.add_argument("--data", required=True, help="data YAML, here or in data/")
    parser.add_argument("--data-root", help="folder of data sets (default: YOLO_DATASETS, else datasets/ in the project)")
    args = parser.parse_args(argv)
    info(f"ready in {download(load_data_spec(args.data, args.data_root))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
