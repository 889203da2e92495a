"""Metadata behind a compiled graph, as a zip archive at its file's end: who reads the graph does not see the archive, nor the other way round."""
from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.export.metadata import KEY

if TYPE_CHECKING:
    from utils.export.metadata import ExportMetadata

METADATA = f"{KEY}.json"
_LABELS = "labels.txt"
_MOST_BYTES = 16 << 20  # of metadata


class Trailer(NamedTuple):
    """Attributes:
    props: metadata by key.
    start: where it begins in its file, which is where the graph ends, bytes.
    """

    props: dict[str, str]
    start: int


def append_trailer(path: Path, metadata: ExportMetadata) -> None:
    """And the class names, a line each, as TensorFlow's example programs read them."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(METADATA, metadata.to_props()[KEY])
        archive.writestr(_LABELS, "".join(f"{' '.join(name.split())}\n" for name in metadata.names))


def read_trailer(path: Path) -> Trailer | None:
    """What `append_trailer` wrote; None where there is none, or none that can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(METADATA)
            if entry.file_size <= _MOST_BYTES:
                return Trailer({KEY: archive.read(entry).decode()}, min(each.header_offset for each in archive.infolist()))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, NotImplementedError, RuntimeError, ValueError, OSError):
        pass
    return None
