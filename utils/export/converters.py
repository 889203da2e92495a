"""A network's graph out of PyTorch: to an ONNX, TorchScript, TFLite or MNN file or an OpenVINO, ncnn or Core ML model, traced on a few images."""
from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from utils.errors import UserError, error_lines
from utils.export.metadata import CONFIG, KEY, ExportMetadata
from utils.extras import import_extra, is_installed
from utils.log import no_output, silent_libraries

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
        UserError: neither exporter writes this opset.
    """
    network = _channels_first(network)

    def export(**how: Any) -> Exception | None:
        """What went wrong: of an exporter an error of any kind."""
        try:
            torch.onnx.export(network, (images.contiguous(),), str(path), input_names=[INPUT], output_names=[OUTPUT], opset_version=opset, **how)
        except (MemoryError, OSError):  # a full disk is nothing that the other one could help
            raise
        except Exception as error:
            return error
        return None

    with quiet(), _plain_attention(), FreeAttention(), silent_libraries():
        axes = {INPUT: _FREE, OUTPUT: {0: "batch", 1: "boxes"}} if dynamic else None
        older = export(dynamic_axes=axes, dynamo=False)
        if older is None:
            return
        if not is_installed("onnxscript"):
            raise RuntimeError(f"{error_lines(older)[0]} (PyTorch's newer exporter may know better: pip install onnxscript)") from older
        shapes = (dict.fromkeys(_FREE, torch.export.Dim.AUTO),) if dynamic else None
        newer = export(dynamic_shapes=shapes, external_data=False, dynamo=True, verbose=False)
        if newer:
            raise RuntimeError(f"PyTorch's two exporters fail: {error_lines(older)[0]}; {error_lines(newer.__cause__ or newer)[0]}") from newer
    written = [entry.version for entry in import_extra("onnx").load(str(path)).opset_import if not entry.domain]
    if opset and opset not in written:  # it only logs that it has written another
        raise UserError(f"--opset {opset}: PyTorch's exporters write {written[0]} in its place: leave it out, or ask for one that they know")


def to_openvino(network: nn.Module, images: Tensor, *, dynamic: bool = False) -> openvino.Model:
    """`network` as an OpenVINO model with the input `images` and, where it has one output, `output0`; arguments as of `to_onnx`."""
    openvino = import_extra("openvino")
    images = images.contiguous()
    shape = [-1 if dynamic and axis in _FREE else side for axis, side in enumerate(images.shape)]
    with quiet(), _plain_attention():
        model = openvino.convert_model(trace(_channels_first(network), images), example_input=images, input=[shape])
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    return model


def to_torchscript(network: nn.Module, images: Tensor, path: Path, metadata: ExportMetadata) -> None:
    """Write `network` as a TorchScript file that holds its metadata as texts; images as of `to_onnx`."""
    config = {"shape": list(images.shape), "stride": metadata.max_stride, "names": dict(enumerate(metadata.names))}
    with quiet(), _plain_attention():
        traced = trace(network, images.contiguous(memory_format=torch.channels_last))
        _save(traced, path, {KEY: metadata.to_props()[KEY], CONFIG: json.dumps(config)})


def _save(traced: torch.jit.ScriptModule, path: Path, texts: dict[str, str]) -> None:
    """Through memory: PyTorch's own writer ends the process where the disk is full."""
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files=texts)
    path.write_bytes(buffer.getbuffer())


def to_ncnn(network: nn.Module, images: Tensor, param: Path, weights: Path, *, half: bool = False) -> None:
    """Write `network` as an ncnn graph and its weights, which half stores in fp16; images (1, 3, H, W), the only size that it will take.

    Raises:
        RuntimeError: ncnn lacks a layer for what the network does, or pnnx fails on it.
    """
    with TemporaryDirectory() as folder:
        traced, places = Path(folder) / "network.pt", {"ncnnparam": param.resolve(), "ncnnbin": weights.resolve()}
        with quiet(), _plain_attention(), _SelectByConvolution():
            _save(trace(_channels_first(network), images.contiguous()), traced, {})
        shape = ",".join(map(str, images.shape))
        command = [import_extra("pnnx").EXEC_PATH, traced.name, f"inputshape=[{shape}]f32", f"fp16={int(half)}",
                   *(f"{name}={place}" for name, place in places.items())]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if run.returncode or not param.is_file():
        raise RuntimeError(f"pnnx ends with {run.returncode}: {(run.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
    layers = {line.split()[0] for line in param.read_text(encoding="utf-8").splitlines()[2:] if line.strip()}
    if foreign := sorted(layer for layer in layers if "." in layer or "::" in layer):
        raise RuntimeError(f"ncnn has no layer for {', '.join(foreign)}")


class _SelectByConvolution(TorchFunctionMode):
    """ncnn has no layer that picks channels, as the shuffle of a pruned ShuffleNet does: a convolution by ones and zeros gives the same numbers."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.index_select and len(args) == 3 and args[1] == 1 and args[0].dim() == 3:
            x, _, order = args
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of the order, which is to become a constant
                ones = np.eye(x.shape[1], dtype=np.float32)[order.numpy()]  # (channels out, channels in)
            return torch.conv1d(x, torch.from_numpy(ones)[..., None])
        return func(*args, **(kwargs or {}))


class FreeAttention(TorchFunctionMode):
    """nn.MultiheadAttention of a sequence to itself, for any number of places: PyTorch's own would be fixed to that of the images traced with."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.multi_head_attention_forward or not _is_plain(*args, **kwargs):
            return func(*args, **kwargs)
        x, heads, in_weight, in_bias, out_weight, out_bias = args[0], args[4], args[5], args[6], args[11], args[12]  # x: (N, B, C)
        parts = functional.linear(x, in_weight, in_bias).chunk(3, -1)
        queries, keys, values = (part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for part in parts)  # (B, heads, N, C / heads)
        weights = (queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5).softmax(-1)
        return functional.linear((weights @ values).permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None


def _is_plain(query: Tensor, key: Tensor, value: Tensor, *args: Any, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None,
              need_weights: bool = True, use_separate_proj_weight: bool = False, **kwargs: Any) -> bool:
    """Whether these arguments of `multi_head_attention_forward` ask for nothing beyond attention."""
    bias_k, bias_v, add_zero_attn = args[4:7]
    extras = (bias_k, bias_v, key_padding_mask, attn_mask)
    return (query is key is value and query.dim() == 3 and all(extra is None for extra in extras)
            and not (add_zero_attn or need_weights or use_separate_proj_weight))


def to_tflite(network: nn.Module, images: Tensor, path: Path, *, half: bool = False) -> None:
    """Write `network` as a TFLite file that takes images (B, H, W, 3) of this size alone, as programs for phones give them; `half` stores its
    weights in fp16, which are computed with in fp32."""
    with silent_libraries(), no_output(1), no_output(2):  # it tells of every step
        litert = import_extra("litert_torch")
        last = litert.to_channel_last_io(_channels_first(network), args=[0]).eval()
        litert.convert(last, (images.permute(0, 2, 3, 1).contiguous(),)).export(str(path))
        if half:
            _halve_weights(path)


def _halve_weights(path: Path) -> None:
    quantizer, types, recipe = (import_extra(f"ai_edge_quantizer.{name}") for name in ("quantizer", "qtyping", "recipe"))
    weights = types.TensorQuantizationConfig(num_bits=16, dtype=types.TensorDataType.FLOAT)
    halves = quantizer.Quantizer(str(path))
    halves.update_quantization_recipe(
        regex=".*", operation_name=types.TFLOperationName.ALL_SUPPORTED, algorithm_key=recipe.AlgorithmName.FLOAT_CASTING,
        op_config=types.OpQuantizationConfig(weight_tensor_config=weights, compute_precision=types.ComputePrecision.FLOAT,
                                             explicit_dequantize=True))
    path.write_bytes(halves.quantize().quantized_model)


def to_coreml(network: nn.Module, images: Tensor, folder: Path, texts: Mapping[str, str]) -> None:
    """Write `network` as a Core ML package that holds `texts`. Its input `image` is one RGB picture of this size, as Apple's Vision gives it; it
    computes in the precision that each part of the network has."""
    with quiet(), _plain_attention(), silent_libraries(), no_output(2):  # it tells of every step
        coremltools = import_extra("coremltools")
        picture = coremltools.ImageType("image", tuple(images.shape), scale=1 / 255, color_layout=coremltools.colorlayout.RGB)
        package = coremltools.convert(trace(_channels_first(network), images.contiguous()), convert_to="mlprogram", inputs=[picture],
                                      outputs=[coremltools.TensorType(OUTPUT)], compute_precision=coremltools.precision.FLOAT32,
                                      skip_model_load=True)
        package.user_defined_metadata.update(texts)
        mode = folder.stat().st_mode
        package.save(str(folder))
    for path in (folder, *folder.rglob("*")):  # it makes some for their owner alone
        path.chmod(mode if path.is_dir() else mode & 0o666)


_CONVERT_TO_MNN = "import json, sys, _tools; _tools.mnnconvert(json.load(sys.stdin))"


def to_mnn(onnx_path: Path, path: Path, text: str, *, half: bool = False) -> None:
    """Write an ONNX file as an MNN file, for any batch and image size if the ONNX file is, with a text for its user; half stores weights in fp16.

    By the part of MNN's Python package that converts, not by the program `mnnconvert` that it brings nor its `MNN.tools`: these install another
    package and report name, size and machine of what is converted to MNN's makers. In a process of its own, which what it can't convert may end.

    Raises:
        RuntimeError: MNN can't convert it.
    """
    with TemporaryDirectory() as folder:
        made = Path(folder) / "network.mnn"
        command = ["mnnconvert", "-f", "ONNX", "--modelFile", str(onnx_path.resolve()), "--MNNModel", str(made), "--bizCode", text]
        command += ["--fp16"] * half
        run = subprocess.run([sys.executable, "-c", _CONVERT_TO_MNN], cwd=folder, input=json.dumps(command), capture_output=True, text=True,
                             errors="replace")
        if run.returncode or not made.is_file():
            said = [line for line in f"{run.stdout}\n{run.stderr}".splitlines() if line.strip()]
            raise RuntimeError(f"MNN's converter ends with {run.returncode}: {(said or ['it says nothing'])[-1]}")
        path.write_bytes(made.read_bytes())  # the converter does not tell that the disk is full


@torch.no_grad()
def trace(network: nn.Module, images: Tensor) -> torch.jit.ScriptModule:
    return torch.jit.trace(network, images, check_trace=False)  # the check would run it again and again


def _channels_first(network: nn.Module) -> nn.Module:
    """A copy that keeps tensors in PyTorch's own layout. These runtimes choose theirs; a block that minds the layout, such as ShuffleNet's channel
    shuffle, would bring the transpositions into the graph that are fast in PyTorch alone."""
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)


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
    """PyTorch announces the end of what it still has no fast replacement for, and warns of shapes that are fixed here on purpose.

    Where its exporter meets an operator that it doesn't know, it prints the whole graph, past Python's stdout; then it raises.
    """
    with warnings.catch_warnings(), no_output(1):
        warnings.filterwarnings("ignore", message=r".*`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript-based ONNX export")
        warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield
