"""What a network is and costs: the table of its rows, counted parameters and GFLOPs, measured latency and memory.

    python -m models.summary --cfg yolov5s-ghost.yaml --imgsz 640
"""
from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import thop
import torch
from thop.vision.basic_hooks import count_normalization, zero_ops
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.plugin import load_plugin
from models.spec import load_spec
from models.yolo import DetectionModel
from utils.cpu import keep_freed_memory
from utils.device import compute_dtype, describe, peak_memory_bytes, select_device
from utils.errors import UserError, script
from utils.flags import Parser
from utils.log import info
from utils.measure.runtimes import pytorch_run
from utils.measure.timing import reference_convolution, time_interleaved

_ROUNDS, _BUDGET_S = 7, 4.0


class Cost(NamedTuple):
    """Of one network at one image size."""

    layers: int  # leaf modules
    parameters: int
    gradients: int  # parameters that train
    gflops: float  # 2 x MACs of one image
    latency_ms: float  # median of one fused image
    remark: str  # what a reader must know of the machine; empty where it was quiet


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_gflops(model: nn.Module, imgsz: int = 640) -> float:
    """2 x multiply-accumulates of one (imgsz x imgsz) image, in units of 1e9, by thop."""
    # Really run, not on the meta device: PyTorch takes seconds to import what that needs.
    return 2 * count_macs(model, torch.zeros(1, 3, imgsz, imgsz, device=next(model.parameters()).device)) / 1e9


def count_macs(module: nn.Module, inputs: Any) -> float:
    """Multiply-accumulates of one call with one argument."""
    # thop knows exact classes only, and backbones of other libraries are made of classes derived from these
    counters = {type(part): rule for part in module.modules() for kind, rule in _COUNTERS.items() if isinstance(part, kind)}
    with _Products() as products:
        macs, _ = thop.profile(copy.deepcopy(module).eval(), inputs=(inputs,), custom_ops=counters, verbose=False)
    return float(macs) + products.macs


def _count_attention(module: nn.MultiheadAttention, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    """Four projections, queries x keys, weights x values: thop has no rule for them."""
    batch, tokens, channels = inputs[0].shape
    module.total_ops += batch * (4 * tokens * channels**2 + 2 * tokens**2 * channels)


_COUNTERS = {nn.BatchNorm2d: count_normalization, nn.LayerNorm: count_normalization, nn.MultiheadAttention: _count_attention,
             nn.Softmax: zero_ops,  # a layer in some attentions, within PyTorch's product in others
             **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear), zero_ops)}  # `_Products` counts what they call
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_MATRIX_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


class _Products(TorchFunctionMode):
    """Multiply-accumulates of convolutions, with their biases, of linear layers, and of products of tensors: whether a layer asks for them or a
    block of another's computes with a layer's weights, or with none. Not counted: einsum with an ellipsis or of more than two, and what runs below
    Python, as in nn.MultiheadAttention."""

    macs = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)

        def operands(*names: str) -> list[Any]:
            """The first ones, by place or by name."""
            return [*args[: len(names)], *(kwargs.get(name) for name in names[len(args) :])]

        if func in _CONVOLUTIONS:
            weight, bias = operands("input", "weight", "bias")[1:]
            self.macs += result.numel() * (weight[0].numel() + (bias is not None))
        elif func is torch.conv_transpose2d:
            x, weight, bias = operands("input", "weight", "bias")
            self.macs += x.numel() * weight[0].numel() + result.numel() * (bias is not None)
        elif func is nn.functional.linear or func in _MATRIX_PRODUCTS:
            self.macs += result.numel() * operands("input")[0].shape[-1]
        elif func in (torch.addmm, torch.baddbmm):
            self.macs += result.numel() * (args[1].shape[-1] + 1)
        elif func is torch.einsum:
            self.macs += _einsum_macs(*args)
        elif func is nn.functional.scaled_dot_product_attention:
            queries, keys = operands("query", "key")
            self.macs += (queries.numel() + result.numel()) * keys.shape[-2]
        return result


def _einsum_macs(equation: str, *operands: Tensor) -> int:
    """Of two operands, in letters: every combination of indices is one product. Others go through other functions, or are none."""
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return 0
    letters = equation.replace(" ", "").partition("->")[0].split(",")
    return math.prod({letter: side for word, x in zip(letters, operands, strict=True) for letter, side in zip(word, x.shape, strict=True)}.values())


def measure_cost(model: DetectionModel, imgsz: int, device: torch.device, dtype: torch.dtype) -> Cost:
    network = model.fused().to(device, memory_format=torch.channels_last)
    run = pytorch_run(network, torch.full((1, 3, imgsz, imgsz), 0.5, device=device), dtype)
    timings = time_interleaved({"network": run}, _ROUNDS, budget_s=_BUDGET_S, reference=reference_convolution(device), title="latency")
    leaves = sum(1 for module in model.modules() if not any(module.children()))
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(leaves, count_parameters(model), gradients, count_gflops(model, imgsz), timings.latencies["network"].p50_ms, timings.remark)


def layer_table(model: DetectionModel) -> str:
    """A line for each row: its number, sources, repeats, parameters, block and arguments as built."""
    lines = [f"{'row':>4}  {'from':>12}  {'n':>2}  {'params':>10}  {'module':<22}  arguments"]
    for layer, module in zip(model.spec.layers, model.model, strict=True):
        source = str(list(layer.source)) if isinstance(layer.source, tuple) else str(layer.source)
        arguments = [*layer.args, *(f"{key}={value}" for key, value in layer.kwargs.items())]
        shown = ", ".join(map(str, arguments))
        lines.append(f"{layer.row:>4}  {source:>12}  {layer.repeats:>2}  {count_parameters(module):>10,}  "
                     f"{layer.module:<22}  {shown[:70]}")
    return "\n".join(lines)


def print_summary(model: DetectionModel, imgsz: int, device: torch.device, dtype: torch.dtype, table: bool = True) -> Cost:
    """Print the table and the totals, with where and how the latency was measured."""
    if table:
        info(layer_table(model))
    cost = measure_cost(model, imgsz, device, dtype)
    info(f"{model.spec.origin}: {cost.layers} layers, {cost.parameters:,} parameters, {cost.gradients:,} trained, "
         f"{cost.gflops:.1f} GFLOPs at {imgsz} px, {cost.latency_ms:.1f} ms an image, peak memory {peak_memory_bytes(device) / 2**30:.2f} GB")
    info(f"  measured fused, batch 1, on {describe(device, dtype)}{f'; {cost.remark}' if cost.remark else ''}")
    return cost


@script
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Print a network's rows and what it costs on this machine.")
    parser.add_argument("--cfg", required=True, help="model YAML, found as given, in models/, models/hub/ or models/timm/")
    parser.add_argument("--imgsz", type=int, default=640, help="image size, pixels (default: 640)")
    parser.add_argument("--device", default="", help="cpu or a CUDA device's number")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--plugin", default="", help="a Python file of your own blocks")
    args = parser.parse_args(argv)
    if not 32 <= args.imgsz <= 8192:
        raise UserError(f"--imgsz {args.imgsz}: must be between 32 and 8192 pixels")
    keep_freed_memory()
    load_plugin(args.plugin)
    device = select_device(args.device)
    model = DetectionModel(load_spec(args.cfg)).to(device)
    print_summary(model, model.whole_strides(args.imgsz), device, compute_dtype(args.precision, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
