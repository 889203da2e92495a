"""TensorRT's Python interface as utils/export/tensorrt.py meets it, computed by ONNX Runtime in host memory: there is no GPU in CI.

Names, arguments and what a failure looks like (None, False, a line for the logger) are those of the bindings of TensorRT 11.4, whose own docstrings
were read; the names that only the real library has raise AttributeError here.
"""
from __future__ import annotations

import ctypes
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
__version__ = "11.4.0"
_MAGIC = b"plan"
NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})  # as in 10; in 11 all networks are
BuilderFlag, TensorIOMode = Enum("BuilderFlag", "TF32"), Enum("TensorIOMode", "NONE INPUT OUTPUT")
flags: list[Any] = []  # that a build had, for tests to read


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)


def nptype(kind: str) -> type:
    mapping = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    if kind not in mapping:  # bf16
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return mapping[kind]


class Started:
    """What fails in its constructor where there is no driver for this TensorRT: a line for the logger, and pybind11's error."""

    driver = True

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        if not Started.driver:
            logger.log(ILogger.WARNING, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")


class Builder(Started):

    def create_network(self, flags: int = 0) -> SimpleNamespace:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return SimpleNamespace(model=None)

    def create_builder_config(self) -> SimpleNamespace:
        flags[:] = [BuilderFlag.TF32]
        return SimpleNamespace(clear_flag=flags.remove)

    def build_serialized_network(self, network: SimpleNamespace, config: SimpleNamespace) -> memoryview | None:
        if network.model == b"too large":
            self._logger.log(ILogger.WARNING, "a remark")
            self._logger.log(ILogger.ERROR, "Could not find any implementation for node Conv_0.\nAssertion failed.")
            return None
        return memoryview(_MAGIC + len(network.model).to_bytes(8, "little") + network.model)


class OnnxParser:
    def __init__(self, network: SimpleNamespace, logger: ILogger) -> None:
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def parse(self, model: bytes) -> bool:
        try:
            onnx.checker.check_model(model)
        except Exception as error:
            self._errors.append(SimpleNamespace(desc=lambda text=str(error): text, node_name=lambda: "node_1"))
            return False
        self._network.model = model
        return True

    def get_error(self, index: int) -> SimpleNamespace:
        return self._errors[index]


class Runtime(Started):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        """Nothing but a whole plan, as in TensorRT: its header tells its size."""
        magic, size, model = serialized_engine[:4], int.from_bytes(serialized_engine[4:12], "little"), serialized_engine[12:]
        if magic != _MAGIC or size != len(model):
            self._logger.log(ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization")
            return None
        return ICudaEngine(model, self._logger)


class ICudaEngine:
    def __init__(self, model: bytes, logger: ILogger) -> None:
        self._logger, self._session = logger, onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._io = {value.name: value for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        self.num_io_tensors = len(self._io)

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in [value.name for value in self._session.get_inputs()] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return self._io[name].type

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(side if isinstance(side, int) else -1 for side in self._io[name].shape)

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self, self._session, self._logger)


class IExecutionContext:
    """Its outputs' shapes are known once its input's is; addresses are those of host memory."""

    def __init__(self, engine: ICudaEngine, session: onnxruntime.InferenceSession, logger: ILogger) -> None:
        self._engine, self._session, self._logger = engine, session, logger
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if any(own not in (-1, side) for own, side in zip(self._engine.get_tensor_shape(name), shape, strict=True)):
            self._logger.log(ILogger.ERROR, f"IExecutionContext::setInputShape: Error Code 3: {name} of another shape")
            return False
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name) or self._engine.get_tensor_shape(name)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7
        (given,) = self._session.get_inputs()
        results = self._session.run(None, {given.name: self._memory(given.name).copy()})
        for value, result in zip(self._session.get_outputs(), results, strict=True):
            self._memory(value.name)[...] = result
        return True

    def _memory(self, name: str) -> np.ndarray:
        dtype, shape = np.dtype(nptype(self._engine.get_tensor_dtype(name))), self.get_tensor_shape(name)
        raw = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)
