"""TensorRT engines: a network compiled for one kind of NVIDIA GPU by one release of TensorRT; built and run there."""
from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError, error_lines, short_reason
from utils.export.trailer import read_trailer
from utils.extras import import_extra

ENGINE_SUFFIX = ".engine"
_MEND = "it is cut off, or built by another release of TensorRT or for another GPU: export it again here"


def build_engine(onnx_path: Path, path: Path) -> None:
    """Compile an ONNX file for PyTorch's current CUDA device; what is fp16 in it is computed in fp16, and fp32 in fp32.

    Raises:
        RuntimeError: TensorRT knows no way to compute what is in it, or lacks memory.
    """
    tensorrt = import_extra("tensorrt")
    log = _Log(tensorrt)
    builder = tensorrt.Builder(log.sink)
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

    Raises:
        UserError: no CUDA device, or the engine is not for it.
    """

    def __init__(self, path: Path, device: str = "") -> None:
        self._torch = torch = import_extra("torch")  # here alone: files of other formats go without it
        self._device = _cuda(path, torch, device)
        tensorrt = import_extra("tensorrt")
        trailer = read_trailer(path)
        plan = path.read_bytes()[: trailer.start if trailer else None]  # TensorRT wants no byte more
        self._log, self._lock = _Log(tensorrt), threading.Lock()
        try:
            with torch.cuda.device(self._device):
                self._stream = torch.cuda.Stream()
                self._runtime = tensorrt.Runtime(self._log.sink)  # its engines live as long as it does
                self._engine = self._runtime.deserialize_cuda_engine(plan)
                self._context = None if self._engine is None else self._engine.create_execution_context()
        except Exception as error:  # of a driver or a reader: of any kind
            raise UserError(f"{path}: TensorRT can't load it, {_MEND}: {short_reason(error)}") from None
        if self._context is None:
            raise UserError(f"{path}: TensorRT can't load it, {_MEND}: {self._log.last}")
        names = [self._engine.get_tensor_name(n) for n in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        types = {name: np.dtype(tensorrt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._input, self._outputs = inputs[0], {name: types[name] for name in names if name not in inputs}
        self.inputs = self._shape(self._input) if len(inputs) == 1 else None
        self.outputs = self._shape(next(iter(self._outputs)))
        self.dtype = types[self._input]
        self.props = trailer.props if trailer else {}
        self.description = f"TensorRT {tensorrt.__version__}, {torch.cuda.get_device_name(self._device)}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        torch, context = self._torch, self._context
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            given = torch.from_numpy(images).to(self._device)
            if not context.set_input_shape(self._input, tuple(given.shape)):
                raise RuntimeError(self._log.last)
            taken = [torch.from_numpy(np.empty(tuple(context.get_tensor_shape(name)), dtype)).to(self._device)
                     for name, dtype in self._outputs.items()]
            for name, tensor in zip((self._input, *self._outputs), (given, *taken), strict=True):
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError(self._log.last)
            return taken[0].cpu().numpy()  # which waits for the stream

    def _shape(self, name: str) -> tuple[int | None, ...]:
        return tuple(side if side > 0 else None for side in self._engine.get_tensor_shape(name))


class _Log:
    """TensorRT's errors, which it tells a logger and nobody else."""

    def __init__(self, tensorrt: Any) -> None:
        errors = self._errors = []

        class Sink(tensorrt.ILogger):
            def log(self, severity: Any, text: str) -> None:
                if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                    errors.append(text)

        self.sink = Sink()

    @property
    def last(self) -> str:
        return error_lines(RuntimeError(self._errors[-1]))[0] if self._errors else "it does not say why"



def _cuda(path: Path, torch: Any, device: str) -> Any:
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(f"{path}: an engine runs on the NVIDIA GPU that it was built for: " + (
            "leave out --device cpu, or use another format" if torch.cuda.is_available() else "take the checkpoint here, or another format"))
    return torch.device(device or "cuda")
