"""MNN files: a graph for phones and boards, its metadata in the text that MNN keeps for its user (bizCode); run by MNN's Python package."""
from __future__ import annotations

import json
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.export.metadata import metadata_from_props, props_from_content
from utils.export.sessions import Shape
from utils.extras import import_extra
from utils.log import no_output

MNN_SUFFIX = ".mnn"
_INPUT, _OUTPUT = "images", "output0"  # as in the ONNX files that MNN's are made of


class MnnSession:
    """An MNN file on the CPU, for one caller at a time: its Python package keeps Python's own lock while it computes.

    One core is left for whatever else runs: MNN's threads spin while they wait for each other, and beside a single busy process an image took ten
    times as long on all cores as on one (docs/deploy.md).

    What an fp16 file holds is computed in fp16 where the processor can (MNN's precision "low"); anything else in fp32.
    """

    def __init__(self, path: Path, threads: int) -> None:
        with no_output(1), no_output(2):  # it tells of the processor and of its errors
            self._mnn = import_extra("MNN")
            self._turn = threading.Lock()
            threads = max(threads - 1, 1)
            try:
                images = self._mnn.expr.load_as_dict(str(path))[_INPUT].shape
                self.props = _props(_own_text(path.read_bytes()))
                metadata = metadata_from_props(self.props, str(path))
                precision = metadata.precision if metadata else "fp32"
                self._module = self._load(path, threads, "low" if precision == "fp16" else "high")
            except (KeyError, RuntimeError, SystemError, struct.error):
                raise UserError(f"{path}: MNN can't load it, it may be cut off or no MNN file of a detector, from {_INPUT} to {_OUTPUT}") from None
        sides = tuple(side if side > 0 else None for side in images)
        # MNN tells a free batch as one image: where the others are free it is too, in our own files.
        self.inputs: Shape | None = (None, *sides[1:]) if metadata and metadata.dynamic else sides
        self.outputs: Shape | None = (None, None, None)
        self.dtype = np.dtype(np.float32)
        self.description = f"MNN {self._mnn.version()}, {'fp32, ' * (precision == 'fp32')}{threads} threads"

    def _load(self, path: Path, threads: int, precision: str) -> Any:
        options = {"backend": "CPU", "numThread": threads, "precision": precision}
        runtime = self._mnn.nn.create_runtime_manager((options,))
        return self._mnn.nn.load_module_from_file(str(path), [_INPUT], [_OUTPUT], runtime_manager=runtime)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        expr = self._mnn.expr
        with self._turn:
            boxes = self._module.forward([expr.const(images, list(images.shape), expr.NCHW, expr.float)])
            if not boxes:
                raise RuntimeError(f"MNN gives no {_OUTPUT}")
            return boxes[0].read().copy()  # the next images are computed into the same memory


def _own_text(graph: bytes) -> bytes:
    """The bizCode of a FlatBuffers file that MNN can load: the first field of its root table. MNN's own reader of it ends the process where a
    byte is no UTF-8."""
    (root,) = struct.unpack_from("<I", graph)
    vtable = root - struct.unpack_from("<i", graph, root)[0]
    (field,) = struct.unpack_from("<H", graph, vtable + 4)
    if not field:
        return b""
    start = root + field + struct.unpack_from("<I", graph, root + field)[0] + 4
    return graph[start : start + struct.unpack_from("<I", graph, start - 4)[0]]


def _props(text: bytes) -> dict[str, str]:
    """Of the JSON object that export.py, and other projects, keep there."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    return props_from_content(content) if isinstance(content, dict) else {}
