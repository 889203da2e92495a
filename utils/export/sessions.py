"""Exported files in their own runtimes: arrays in, arrays out, safe to call from several threads at once."""
from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.errors import UserError, error_lines, short_reason
from utils.export.metadata import openvino_props
from utils.extras import import_extra
from utils.signals import keep_signal_stack

Shape = tuple[int | None, ...]  # None: any
_binding = threading.Lock()


class Session(Protocol):
    """One image batch (B, 3, H, W) of `dtype` to the file's first output.

    Attributes:
        inputs, outputs: shapes, None where the file has more than one input, or a rank that is not known.
        props: its metadata.
        description: runtime, version, precision and threads.
    """

    inputs: Shape | None
    outputs: Shape | None
    dtype: np.dtype
    props: dict[str, str]
    description: str

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


class OnnxSession:
    """An ONNX file in ONNX Runtime, on the CPU.

    Every caller computes in its own thread; the threads that are left over beside `at_once` callers help whoever is running.
    """

    def __init__(self, path: Path, threads: int, at_once: int) -> None:
        onnxruntime = import_extra("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(threads - at_once + 1, 1)
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong also raises
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of the parser, the checker or a kernel: of any kind
            raise UserError(f"{path}: ONNX Runtime can't load it, it may be cut off or no ONNX file: {short_reason(error)}") from None
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        images, boxes = inputs[0] if len(inputs) == 1 else None, outputs[0] if outputs else None
        self._names = images and images.name, boxes and boxes.name
        self.inputs, self.outputs = images and _onnx_shape(images), boxes and _onnx_shape(boxes)
        self.dtype = np.dtype(np.float16 if images and images.type == "tensor(float16)" else np.float32)
        self.props = dict(self._session.get_modelmeta().custom_metadata_map)
        self.description = f"ONNX Runtime {onnxruntime.__version__}, {threads} threads"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._session.run([self._names[1]], {self._names[0]: images})[0]


def _onnx_shape(value: Any) -> Shape | None:
    return tuple(side if isinstance(side, int) and side > 0 else None for side in value.shape) if value.shape else None


class OpenvinoSession:
    """An OpenVINO model on the CPU, with a stream for each of `at_once` callers and a request for each thread.

    Args:
        path: the .xml; its .bin lies beside it.
        bf16: compute in bf16 (the weights stay as they are), else in fp32.
    """

    def __init__(self, path: Path, threads: int, at_once: int, bf16: bool = False) -> None:
        openvino = import_extra("openvino")
        if not path.with_suffix(".bin").is_file():
            raise UserError(f"{path}: its weights {path.with_suffix('.bin').name} are missing: keep the two files together")
        settings = {
            "NUM_STREAMS": at_once, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            # Pinned to a core, as by default, a stream waits for whatever else runs there while the others idle: decoding, encoding, another program.
            "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        try:
            model = openvino.Core().read_model(path)
            with keep_signal_stack():
                self._compiled = openvino.compile_model(model, "CPU", settings)
        except Exception as error:  # of the parser or a kernel: of any kind; it lists where it was before it says why
            raise UserError(f"{path}: OpenVINO can't load it, it may be cut off or no OpenVINO model: {error_lines(error)[-1]}") from None
        # Its bindings to NumPy are made at the first need of them: two threads that need them first, each holding what the other waits for, hang.
        with _binding:
            openvino.Type.f32.to_dtype()
        self._own = threading.local()
        self.inputs = _openvino_shape(model.inputs[0]) if len(model.inputs) == 1 else None
        self.outputs = _openvino_shape(model.outputs[0]) if model.outputs else None
        self.dtype = np.dtype(np.float16 if model.inputs and model.inputs[0].get_element_type() == openvino.Type.f16 else np.float32)
        self.props = openvino_props(model)
        release = openvino.__version__.partition("-")[0]
        self.description = f"OpenVINO {release}, {'bf16' if bf16 else 'fp32'}, {threads} threads"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        return self._own.request.infer([images], share_inputs=True)[0]


def _openvino_shape(port: Any) -> Shape | None:
    shape = port.get_partial_shape()
    return None if shape.rank.is_dynamic else tuple(None if side.is_dynamic else side.get_length() for side in shape)
