"""TFLite files: a graph for phones and boards, its metadata behind it where TensorFlow's specification has it; run by LiteRT's Python package."""
from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import UserError, short_reason
from utils.export.trailer import METADATA, read_trailer
from utils.extras import import_extra
from utils.log import no_output

if TYPE_CHECKING:
    from utils.export.sessions import Shape

TFLITE_SUFFIX = ".tflite"


class TfliteSession:
    """A TFLite file on the CPU, an interpreter for each calling thread, with the share of the threads that each of `at_once` has."""

    def __init__(self, path: Path, threads: int, at_once: int) -> None:
        litert = import_extra("ai_edge_litert")
        self._new = import_extra("ai_edge_litert.interpreter").Interpreter
        self._content, self._threads, self._own = path.read_bytes(), max(threads // at_once, 1), threading.local()
        self.props = _props(path)
        try:
            with no_output(2):  # it tells of its kernels, once a process
                interpreter = self._interpreter()
        except Exception as error:  # of the parser or a kernel: of any kind
            raise UserError(f"{path}: LiteRT can't load it, it may be cut off or no TFLite file: {short_reason(error)}") from None
        images, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        self._names = images[0]["index"], outputs[0]["index"]
        self.inputs, self.outputs = _shape(images) if len(images) == 1 else None, tuple(map(int, outputs[0]["shape"]))
        self.dtype = np.dtype(images[0]["dtype"])
        self.description = f"LiteRT {litert.__version__}, {threads} threads"

    def _interpreter(self) -> Any:
        if not hasattr(self._own, "interpreter"):
            self._own.interpreter = self._new(model_content=self._content, num_threads=self._threads)
            self._own.interpreter.allocate_tensors()
        return self._own.interpreter

    def __call__(self, images: np.ndarray) -> np.ndarray:
        interpreter = self._interpreter()
        interpreter.set_tensor(self._names[0], np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        interpreter.invoke()
        return interpreter.get_tensor(self._names[1])


def _props(path: Path) -> dict[str, str]:
    trailer = read_trailer(path)
    if trailer is None:  # names alone, from --data, would not do: YOLOv5's own TFLite files give boxes in shares of the image, others in pixels
        raise UserError(f"{path}: holds no {METADATA} of export.py: it is cut off, or of another program, whose boxes' units it does not tell: "
                        "export it from its checkpoint")
    return trailer.props


def _shape(images: list[dict[str, Any]]) -> Shape | None:
    """(B, H, W, 3), as TFLite's programs have it, in the order of the other formats."""
    shape = tuple(map(int, images[0]["shape"]))
    return (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else None
