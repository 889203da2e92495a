"""TensorRT engines: a network compiled for one kind of NVIDIA GPU by one release of TensorRT; built and run there."""
from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.errors import UserError, error_lines, short_reason
from utils.export.trailer import read_trailer
from utils.extras import import_extra

ENGINE_SUFFIX = ".engine"
_OLDEST = 10  # release: the first with networks whose types are those of the ONNX file


def build_engine(onnx_path: Path, path: Path) -> None:
    """Compile an ONNX file for PyTorch's current CUDA device; what is fp16 in it is computed in fp16, and fp32 in fp32.

    Raises:
        UserError: TensorRT is too old.
        RuntimeError: it can't use the GPU, knows no way to compute what is in the file, or lacks memory.
    """
    tensorrt = _tensorrt()
    log = _Log(tensorrt)
    builder = log.start(tensorrt.Builder)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, log.sink)
    if not parser.parse(onnx_path.read_bytes()):
        raise RuntimeError("; ".join(f"{error.node_name() or 'graph'}: {error.desc()}" for error in map(parser.get_error, range(parser.num_errors))))
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # which keeps 10 bits of each factor: --half is the way to speed
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT builds no engine: {log.last}")
    path.write_bytes(plan)


class EngineSession:
    """A TensorRT engine on a CUDA device, one batch at a time.

    Args:
        device: as PyTorch names it; "": its current one.

    Attributes:
        device: where it is, with its number.

    Raises:
        UserError: no CUDA device, or the engine is not for it.
    """

    def __init__(self, path: Path, device: str = "") -> None:
        self._torch = torch = import_extra("torch")  # here alone: files of other formats go without it
        self.device = _cuda(path, torch, device)
        tensorrt = _tensorrt()
        trailer = read_trailer(path)
        plan = path.read_bytes()[: trailer.start if trailer else None]  # TensorRT wants no byte more
        self._log, self._lock, self._place = _Log(tensorrt), threading.Lock(), torch.device(self.device)
        try:
            with torch.cuda.device(self._place):
                self._stream = torch.cuda.Stream()
                self._runtime = self._log.start(tensorrt.Runtime)  # its engines live as long as it does
                self._engine = self._runtime.deserialize_cuda_engine(plan)
                self._context = None if self._engine is None else self._engine.create_execution_context()
        except Exception as error:  # of a driver or a reader: of any kind
            raise UserError(f"{path}: {short_reason(error)}") from None
        if self._engine is None:
            raise UserError(f"{path}: TensorRT can't load it, it is cut off, or built by another release of TensorRT or for another GPU: export it "
                            f"again here: {self._log.last}")
        if self._context is None:
            raise UserError(f"{path}: TensorRT can't run it, perhaps for lack of memory on the GPU: {self._log.last}")
        try:
            self._describe(tensorrt)
        except Exception:  # TensorRT's own tables raise several kinds
            raise UserError(f"{path}: is no detector: it has no one input and outputs in fp32 or fp16") from None
        self.props = trailer.props if trailer else {}
        self.description = f"TensorRT {tensorrt.__version__}, {torch.cuda.get_device_name(self._place)}"

    def _describe(self, tensorrt: ModuleType) -> None:
        names = [self._engine.get_tensor_name(n) for n in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        types = {name: np.dtype(tensorrt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._input = inputs[0]
        self._outputs = {name: self._torch.from_numpy(np.empty(0, types[name])).dtype for name in names if name not in inputs}
        self.inputs = self._shape(self._input) if len(inputs) == 1 else None
        self.outputs = self._shape(next(iter(self._outputs)))
        self.dtype = types[self._input]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        torch, context = self._torch, self._context
        with self._lock, torch.cuda.device(self._place), torch.cuda.stream(self._stream):
            given = torch.from_numpy(images).to(self._place)
            if not context.set_input_shape(self._input, tuple(given.shape)):
                raise RuntimeError(self._log.last)
            taken = [torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self._place) for name, dtype in self._outputs.items()]
            for name, tensor in zip((self._input, *self._outputs), (given, *taken), strict=True):
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError(self._log.last)
            return taken[0].cpu().numpy()  # which waits for the stream

    def _shape(self, name: str) -> tuple[int | None, ...]:
        return tuple(side if side > 0 else None for side in self._engine.get_tensor_shape(name))


class _Log:
    """What goes wrong in TensorRT, which it tells a logger and nobody else."""

    def __init__(self, tensorrt: ModuleType) -> None:
        kinds = tensorrt.ILogger
        latest = self._latest = {}  # of each kind, as an engine may warn with every image

        class Sink(kinds):
            def log(self, severity: Any, text: str) -> None:
                if severity in (kinds.ERROR, kinds.INTERNAL_ERROR):
                    latest["error"] = text
                elif severity == kinds.WARNING:
                    latest["warning"] = text

        self.sink = Sink()

    def start(self, kind: Callable[[Any], Any]) -> Any:
        """A Builder or a Runtime, which fail with a TypeError of their bindings."""
        try:
            return kind(self.sink)
        except Exception:
            raise RuntimeError(f"TensorRT can't start on this GPU: {self.last}") from None

    @property
    def last(self) -> str:
        """Of the errors, or where there are none (a driver that is too old) of the warnings."""
        text = self._latest.get("error") or self._latest.get("warning")
        return error_lines(RuntimeError(text))[0] if text else "it does not say why"


def _tensorrt() -> ModuleType:
    tensorrt = import_extra("tensorrt")
    if int(tensorrt.__version__.partition(".")[0]) < _OLDEST:
        raise UserError(f"needs TensorRT {_OLDEST} or newer, this one is {tensorrt.__version__}: pip install -U tensorrt")
    return tensorrt


def _cuda(path: Path, torch: ModuleType, device: str) -> str:
    """The CUDA device of that name, with its number."""
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(f"{path}: an engine runs on the NVIDIA GPU that it was built for: " + (
            "leave out --device cpu, or use another format" if torch.cuda.is_available() else "take the checkpoint here, or another format"))
    return device or f"cuda:{torch.cuda.current_device()}"
