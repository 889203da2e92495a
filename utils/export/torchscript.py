"""TorchScript files, which PyTorch runs without the network's Python classes: looked through first, as they hold a program."""
from __future__ import annotations

import json
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.export.metadata import CONFIG, FOREIGN_KEYS, KEY, metadata_from_props
from utils.export.sessions import Shape, short_reason
from utils.extras import import_extra

TORCHSCRIPT_SUFFIX = ".torchscript"
_EXTRA = "/extra/"  # the folder of such texts in the archive
_MOST_BYTES = 64 << 20  # of what is read as text
_AT_LOADING = (b"__setstate__", b"torch.classes")  # what a file can run before anybody looks at its graph
_ACTS_OUTSIDE = {"aten::save", "aten::from_file", "aten::manual_seed", "aten::seed", "prim::PythonOp", "prim::IgnoredPythonOp", "prim::CallMethod",
                 "prim::CallFunction", "prim::rpc_async", "prim::rpc_sync", "prim::rpc_remote"}  # fmt: skip


class TorchscriptSession:
    """A TorchScript file in PyTorch, on the CPU, each image in its caller's thread.

    The file's program is looked through before it may run: one that does more than compute (that saves or reads files, calls other machines, or
    acts while it is loaded) is refused.
    """

    def __init__(self, path: Path, threads: int) -> None:
        texts = _texts(path)
        self._torch = torch = import_extra("torch")  # here alone: files of other formats go without it
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r".*`torch\.jit\.\w+` is deprecated")
                module = torch.jit.load(str(path), map_location="cpu").eval()
                refused = sorted({kind for kind in _kinds(module.inlined_graph) if not _only_computes(kind)})
                if refused:
                    raise UserError(f"{path}: its program does more than compute ({', '.join(refused)}), so it is not run")
                self._network = torch.jit.freeze(module)
        except UserError:
            raise
        except Exception as error:  # of the reader or the compiler: of any kind
            raise UserError(f"{path}: PyTorch can't load it, it may be cut off or of a newer PyTorch: {short_reason(error)}") from None
        config = _config(texts.get(CONFIG, ""))
        self.props = {KEY: texts[KEY]} if KEY in texts else {}
        self.props |= {key: repr(config[key]) for key in FOREIGN_KEYS if key in config}
        metadata = metadata_from_props(self.props, str(path))
        self.inputs, self.outputs = _shape(config, free=bool(metadata and metadata.dynamic)), (None, None, None)
        self.dtype = np.dtype(np.float32)
        self.description = f"TorchScript {torch.__version__.partition('+')[0]}, {threads} threads"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        torch = self._torch
        with torch.inference_mode():
            outputs = self._network.forward(torch.from_numpy(images).contiguous(memory_format=torch.channels_last))
        boxes = outputs if isinstance(outputs, torch.Tensor) else outputs[0]  # YOLOv5's files give a tuple
        return boxes.numpy()


def _texts(path: Path) -> dict[str, str]:
    """The extra texts of a TorchScript archive, by name.

    Raises:
        UserError: it is none, or its code acts while it is loaded.
    """
    texts = {}
    try:
        with zipfile.ZipFile(path) as archive:
            code = False
            for entry in archive.infolist():
                is_code, is_text = "/code/" in entry.filename and entry.filename.endswith(".py"), _EXTRA in entry.filename
                if (is_code or is_text) and entry.file_size > _MOST_BYTES:
                    raise UserError(f"{path}: {entry.filename} in it is of {entry.file_size >> 20} MiB, which no network needs")
                if is_text:
                    texts[entry.filename.partition(_EXTRA)[2]] = archive.read(entry).decode(errors="replace")
                elif is_code:
                    code = True
                    if any(word in archive.read(entry) for word in _AT_LOADING):
                        raise UserError(f"{path}: its program acts while it is loaded, so it is not loaded")
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: is no TorchScript file, or cut off: {short_reason(error)}") from None
    if not code:
        raise UserError(f"{path}: is no TorchScript file: it holds no program (a checkpoint's name ends in .pt)")
    return texts


def _kinds(block: Any) -> Iterator[str]:
    """The operators of a graph and of its branches."""
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _kinds(inner)


def _only_computes(kind: str) -> bool:
    return kind.partition("::")[0] in ("aten", "prim", "torchvision") and kind not in _ACTS_OUTSIDE


def _config(text: str) -> dict[str, Any]:
    """What YOLOv5's own text says, with its names by number; nothing where it can't be understood."""
    with suppress(ValueError, RecursionError):
        config = json.loads(text)
        if isinstance(config, dict):
            names = config.get("names")
            return config | ({"names": {int(key): name for key, name in names.items()}} if isinstance(names, dict) else {})
    return {}


def _shape(config: dict[str, Any], free: bool) -> Shape:
    """Of the images that it was traced on; nothing but their channels where it takes any, or doesn't say."""
    shape = config.get("shape")
    if not (isinstance(shape, list) and len(shape) == 4 and all(type(side) is int and side > 0 for side in shape)):
        return None, 3, None, None
    return (None, shape[1], None, None) if free else tuple(shape)
