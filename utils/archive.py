"""Read the zip files that `torch.save` writes, running nothing that they ask for and believing nothing that they claim."""
from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.unpickle import Instance, Refused, TensorRef, unpickle

MAX_DEPTH = 64  # of nested lists and dicts
MAX_NODES = 100_000  # values in one part of plain data; a tensor is one
_MAX_PICKLE_BYTES = 64 << 20
_BROKEN = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, RuntimeError,
    ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
)  # fmt: skip


class Archive:
    """An open checkpoint. `content` is a tree of plain data, TensorRef, Instance and Global; `plain` turns parts of it into real data.

    Raises:
        UserError: not a file of `torch.save`, broken, or hostile; from `plain` and `tensor` too, as they read on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffers: dict[str, bytearray] = {}
        with _one_line(path):
            _check_kind(path)
            self._zip = zipfile.ZipFile(path)
            try:
                self._root = _check_entries(path, self._zip)
                self.content = unpickle(self._read("data.pkl"))
            except BaseException:
                self._zip.close()
                raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def _read(self, name: str) -> bytes:
        if f"{self._root}/{name}" not in self._zip.NameToInfo:
            raise ValueError(f"{name:.50} is missing in it")
        return self._zip.read(f"{self._root}/{name}")

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor on the CPU; tensors of one storage share its memory."""
        storage = ref.storage
        with _one_line(self.path):
            if storage.key not in self._buffers:
                self._buffers[storage.key] = bytearray(self._read(f"data/{storage.key}"))
            buffer = self._buffers[storage.key]
            # in Python's integers: the same check inside torch.frombuffer overflows
            if len(buffer) < storage.numel * storage.dtype.itemsize:
                raise ValueError(f"storage {storage.key} has {len(buffer)} bytes, {storage.numel} x {storage.dtype} are declared")
            if 0 in ref.size:
                return torch.empty(ref.size, dtype=storage.dtype)
            return torch.frombuffer(buffer, dtype=storage.dtype, count=storage.numel).as_strided(ref.size, ref.stride, ref.offset)

    def plain(self, tree: Any) -> Any:
        """The part `tree` of the content as tensors and plain data; nothing in the result is shared but tensors' memory."""
        budget, text = iter(range(MAX_NODES)), 0

        def copy(node: Any, depth: int) -> Any:
            nonlocal text
            if depth > MAX_DEPTH or next(budget, None) is None:
                raise ValueError("nested or repeated beyond measure")
            if isinstance(node, dict):
                if not all(isinstance(key, (str, int)) for key in node):
                    raise ValueError("holds keys that are neither text nor whole numbers")
                text += sum(len(key) for key in node if isinstance(key, str))
                return {key: copy(value, depth + 1) for key, value in node.items()}
            if isinstance(node, (list, tuple, set)):
                return type(node)(copy(item, depth + 1) for item in node)
            if isinstance(node, TensorRef):
                return self.tensor(node)
            if isinstance(node, (str, bytes)):
                text += len(node)  # written out as often as it is meant
            if text > _MAX_PICKLE_BYTES:
                raise ValueError("its texts are repeated beyond measure")
            if isinstance(node, int) and not -(1 << 63) <= node < 1 << 63:
                raise ValueError("holds a number beyond 64 bits")
            if node is None or isinstance(node, (bool, int, float, str, bytes)):
                return node
            raise ValueError(f"holds {node.cls if isinstance(node, Instance) else node} where plain data is expected")

        with _one_line(self.path):
            return copy(tree, 0)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a broken file does to its readers becomes one line."""
    try:
        yield
    except Refused as error:
        raise UserError(f"{path}: asks for {error}, which no checkpoint needs: refused, nothing was run") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None
    except _BROKEN as error:
        reason = "malformed" if isinstance(error, (LookupError, TypeError, AttributeError)) else str(error)[:200]
        raise UserError(f"{path}: not a whole checkpoint: {reason if reason.isprintable() else ascii(reason)}: copy or download it again") from None


EXPECTED = "expected a checkpoint (.pt) of train.py or of YOLOv5"
_RESAVE = "; if you trust where it comes from, re-save it there with torch.save(torch.load(OLD, weights_only=False), NEW)"
_MAGIC = (
    (0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", "a checkpoint in PyTorch's format from before 1.6" + _RESAVE),
    (0, b"\x80", "a bare pickle" + _RESAVE),
    (257, b"ustar", "a tar archive; if it is a checkpoint of PyTorch before 1.0" + _RESAVE.removeprefix(";")),
    (0, b"\x89HDF", "a Keras or HDF5 file"),
    (4, b"TFL3", "a TFLite network"),
    (8, b"{", "a safetensors file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it first"),
    (0, b"BZh", "a bzip2 archive: unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive: unpack it first"),
    (0, b"Rar!", "a RAR archive: unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG", "a PNG image"),
)
_SUFFIXES = {".onnx": "an ONNX network", ".engine": "a TensorRT engine", ".tflite": "a TFLite network", ".mnn": "an MNN network",
             ".xml": "an OpenVINO network"}


def _check_kind(path: Path) -> None:
    """Say what a file is that `torch.save` did not write."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path}: empty file: copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise ValueError("its end is missing")
        return
    kind = _SUFFIXES.get(path.suffix.lower())
    kind = kind or next((text for offset, magic, text in _MAGIC if head.startswith(magic, offset)), None)
    kind = kind or (_SUFFIXES[".onnx"] if b"onnx" in head[:64].lower() else None)
    kind = kind or ("a text file" if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head) else "no file of torch.save")
    raise UserError(f"{path}: is {kind}; {EXPECTED}")


def _check_entries(path: Path, bundle: zipfile.ZipFile) -> str:
    """The archive's root folder, once its index is proven sane: `torch.save` compresses nothing and repeats nothing."""
    names = bundle.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(set(names)) != len(names):
        raise ValueError("two entries have one name")
    if len(roots) != 1:
        raise UserError(f"{path}: is a zip file without a checkpoint in it; {EXPECTED}")
    if any(name.startswith(f"{roots[0]}/code/") for name in names):
        raise UserError(f"{path}: is a TorchScript network; {EXPECTED}")
    entries = bundle.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("compressed entries, torch.save writes none")
    if any(entry.file_size != entry.compress_size for entry in entries) or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries claim more bytes than the file has")
    if f"{roots[0]}/byteorder" in names and bundle.read(f"{roots[0]}/byteorder") != b"little":
        raise ValueError("saved on a big-endian machine")
    if bundle.getinfo(f"{roots[0]}/data.pkl").file_size > _MAX_PICKLE_BYTES:
        raise ValueError("its data.pkl is too large for a checkpoint")
    return roots[0]
