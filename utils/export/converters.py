"""A network's graph out of PyTorch: to an ONNX or TorchScript file or an OpenVINO model, traced on one batch of images."""
from __future__ import annotations

import ctypes
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.export.metadata import CONFIG, KEY, ExportMetadata
from utils.extras import import_extra, is_installed

if TYPE_CHECKING:
    import openvino

INPUT, OUTPUT = "images", "output0"  # as YOLOv5's ONNX files name them; of several outputs the first
_FREE = {0: "batch", 2: "height", 3: "width"}  # of the images, where any size will do


def to_onnx(network: nn.Module, images: Tensor, path: Path, *, dynamic: bool = False, opset: int | None = None) -> None:
    """Write `network` as an ONNX file, by PyTorch's older exporter, which is much the faster; by its newer one where the older fails or is gone.

    Args:
        network: for inference: fused, in eval mode.
        images: (B, 3, H, W) float32, 0..1.
        dynamic: any B, H and W; else those of `images` alone.
        opset: None leaves it to PyTorch.

    Raises:
        RuntimeError: neither exporter knows what the network does.
    """
    images = images.contiguous()
    names = {"input_names": [INPUT], "output_names": [OUTPUT], "opset_version": opset}
    with quiet(), _plain_attention():
        try:
            axes = {INPUT: _FREE, OUTPUT: {0: "batch", 1: "boxes"}} if dynamic else None
            torch.onnx.export(network, (images,), str(path), **names, dynamic_axes=axes, dynamo=False)
        except Exception as older:
            if not is_installed("onnxscript"):
                raise RuntimeError(f"{_first_line(older)} (PyTorch's newer exporter may know better: pip install onnxscript)") from older
            try:
                shapes = (dict.fromkeys(_FREE, torch.export.Dim.AUTO),) if dynamic else None
                torch.onnx.export(network, (images,), str(path), **names, dynamic_shapes=shapes, external_data=False, dynamo=True, verbose=False)
            except Exception as newer:
                raise RuntimeError(f"PyTorch's two exporters fail: {_first_line(older)}; {_first_line(newer.__cause__ or newer)}") from newer


def to_openvino(network: nn.Module, images: Tensor, *, dynamic: bool = False) -> openvino.Model:
    """`network` as an OpenVINO model with the input `images` and, where it has one output, `output0`; arguments as of `to_onnx`."""
    openvino = import_extra("openvino")
    images = images.contiguous()
    shape = [-1 if dynamic and axis in _FREE else side for axis, side in enumerate(images.shape)]
    with quiet(), _plain_attention():
        model = openvino.convert_model(trace(network, images), example_input=images, input=[shape])
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    return model


def to_torchscript(network: nn.Module, images: Tensor, path: Path, metadata: ExportMetadata) -> None:
    """Write `network` as a TorchScript file that holds its metadata as texts; images as of `to_onnx`."""
    config = {"shape": list(images.shape), "stride": max(metadata.strides), "names": dict(enumerate(metadata.names))}
    with quiet(), _plain_attention():
        traced = trace(network, images.contiguous(memory_format=torch.channels_last))
        torch.jit.save(traced, str(path), _extra_files={KEY: metadata.to_props()[KEY], CONFIG: json.dumps(config)})


@torch.no_grad()
def trace(network: nn.Module, images: Tensor) -> torch.jit.ScriptModule:
    return torch.jit.trace(network, images, check_trace=False)  # the check would run it again and again


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _plain_attention() -> Iterator[None]:
    """nn.MultiheadAttention as matrix products: without gradients it is one operator that only PyTorch knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def quiet() -> Iterator[None]:
    """PyTorch announces the end of what it still has no fast replacement for, and warns of shapes that are fixed here on purpose."""
    with warnings.catch_warnings(), _no_stdout():
        warnings.filterwarnings("ignore", message=r".*`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript-based ONNX export")
        warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


@contextmanager
def _no_stdout() -> Iterator[None]:
    """Where PyTorch's exporter meets an operator that it doesn't know, it prints the whole graph, past Python's stdout; then it raises."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        sys.stdout.flush()
        with suppress(OSError, AttributeError, TypeError):  # no such library to be had: some lines may still show
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
