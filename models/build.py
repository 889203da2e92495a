"""spec -> modules: each row built, then run once on an empty image, so that what does not fit is named by its row."""
from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models.common  # noqa: F401  (registers the blocks)
from models.activations import parse_activation
from models.layers import Conv, slice_strided
from models.narrow import narrow
from models.plugin import plugin_line
from models.registry import Block, Scale, Width, find_block
from models.spec import IMAGE, LayerSpec, ModelSpec
from utils.errors import UserError

_DRY_RUN_PX = 256  # the strides of any head up to P8 divide it
_BN_EPS, _BN_MOMENTUM = 1e-3, 0.03
# Far above every detector's, and below what stops a machine; yolov5x6 has 1.4e8, 1.3e6 and 1.7e10.
_MOST_PARAMETERS = 10**9
_MOST_VALUES = 2**27  # of one layer's output for the dry run's image
_MOST_WORK = 2 * 10**11  # multiply-accumulates and comparisons, all rows together, for that image


class Rows(NamedTuple):
    modules: list[nn.Module]  # one for each row, in training mode
    shapes: list[tuple[Any, ...]]  # (C, H, W) of each row but Detect for an image of 256 x 256, or of each of its levels
    strides: list[int]  # of Detect's levels
    max_stride: int  # image sides must be multiples of it


@torch.no_grad()
def build_rows(spec: ModelSpec) -> Rows:
    """Build a network's rows.

    Raises:
        UserError: a row that can't be built, fails on its inputs, is beyond every machine or is not what its channel rule says.
    """
    act = parse_activation(spec.activation, spec.origin) if spec.activation else None
    scale = _width_scale(spec)
    kept: dict[int, Any] = {IMAGE: torch.zeros(1, 3, _DRY_RUN_PX, _DRY_RUN_PX)}
    modules, parameters, work = [], 0, _Work()
    for layer in spec.layers:
        widths = [_width(kept[s]) for s in layer.sources]
        with torch.device("meta"):  # counted before any memory is taken
            parameters += sum(p.numel() for p in _build_row(layer, widths, scale)[0].parameters())
        if parameters > _MOST_PARAMETERS:
            raise UserError(f"{layer.place}: {parameters:,} parameters up to here are beyond every machine; is a number in {list(layer.args)} "
                            "mistyped?")
        module, width = _build_row(layer, widths, scale)
        slice_strided(module)
        if not find_block(layer.module).foreign:
            _settle(module.modules(), act)
        kept[layer.row] = _run(layer, module.eval(), inputs_of(layer, kept), work)
        if layer.module != "Detect":
            _check_output(layer, kept[layer.row], width)
        modules.append(module.train())
    strides = [_stride(raw, spec.layers[-1]) for raw in kept[len(modules) - 1]]
    shapes = [_shape(kept[row]) for row in range(len(modules) - 1)]
    # The widths of a fused network are of layers that are not there yet.
    shapes = narrow_rows(spec, modules) if spec.widths and not spec.fused else shapes
    return Rows(modules, shapes, strides, _max_stride(spec, modules, max(strides)))


def _max_stride(spec: ModelSpec, modules: Sequence[nn.Module], coarsest: int) -> int:
    """The coarsest level's stride; twice or four times that, where rows between go further down and come up again.

    So that a row which takes images of one size alone is refused here.

    Raises:
        UserError: none of these will do; the row where the first fails.
    """
    told = None
    for stride in (coarsest, 2 * coarsest, 4 * coarsest):
        # In multiples: few, which are soon run; then as large as the image that the rows are known to take.
        for odd in sorted({3, _DRY_RUN_PX // stride | 1}):
            try:
                _dry_run(spec, modules, odd * stride, (odd + 2) * stride)
                return stride
            except UserError as error:
                failed = error
        told = told or failed
    raise told


def _dry_run(spec: ModelSpec, modules: Sequence[nn.Module], height: int = _DRY_RUN_PX, width: int = _DRY_RUN_PX) -> dict[int, Any]:
    """Each row's output for an empty image; the modules are in training mode afterwards."""
    kept: dict[int, Any] = {IMAGE: torch.zeros(1, 3, height, width)}
    work = _Work()
    try:
        for layer, module in zip(spec.layers, modules, strict=True):
            kept[layer.row] = _run(layer, module.eval(), inputs_of(layer, kept), work)
    finally:
        for module in modules:
            module.train()
    return kept


@torch.no_grad()
def narrow_rows(spec: ModelSpec, modules: Sequence[nn.Module]) -> list[tuple[Any, ...]]:
    """Narrow a network's rows as its spec says; their shapes then, as of `Rows`. In training mode.

    Raises:
        UserError: a layer that is not there, or numbers that don't fit each other.
    """
    narrow(nn.ModuleList(modules), spec.widths, spec.origin)
    slice_strided(nn.ModuleList(modules))  # what had channels enough may have few now
    kept = _dry_run(spec, modules)
    return [_shape(kept[row]) for row in range(len(modules) - 1)]


def inputs_of(layer: LayerSpec, kept: Mapping[int, Any]) -> Any:
    """What a row takes of the outputs so far: a tensor, or a list of them where the YAML has a list."""
    return [kept[s] for s in layer.source] if isinstance(layer.source, tuple) else kept[layer.source]


def _shape(output: Any) -> tuple[Any, ...]:
    """(C, H, W) of a map, or of each map of a row that makes several levels."""
    return tuple(map(_shape, output)) if isinstance(output, tuple) else tuple(output.shape[1:])


def _width(output: Any) -> Width:
    return tuple(map(_width, output)) if isinstance(output, tuple) else output.shape[1]


def _build_row(layer: LayerSpec, widths: list[Width], scale: Scale) -> tuple[nn.Module, Width]:
    """The module of a row and its output channels."""
    try:
        block = find_block(layer.module)
    except UserError as error:
        raise UserError(f"{layer.place}: {error}") from None
    for source, width in zip(layer.sources, widths, strict=True):
        if isinstance(width, tuple) and not block.takes_levels:
            raise UserError(f"{layer.place}: row {source} gives {len(width)} levels; pick one with [{source}, 1, Level, [0]] and take that row")
    copies = []
    for _ in range(1 if block.repeats == "inside" else layer.repeats):
        module, width = _build_block(block, layer, widths, scale)
        copies.append(module)
        widths = [width]
    return (copies[0] if len(copies) == 1 else nn.Sequential(*copies)), width


def _build_block(block: Block, layer: LayerSpec, widths: list[Width], scale: Scale) -> tuple[nn.Module, Width]:
    try:
        args, width = block.channels(widths, list(layer.args), scale)
        if block.repeats == "inside":
            args.insert(2, layer.repeats)
        inspect.signature(block.cls).bind(*args, **layer.kwargs)
        module = block.cls(*args, **layer.kwargs)
        return module, module.out_channels if width is None else width
    except UserError as error:
        raise UserError(f"{layer.place}: {error}") from error
    except Exception as error:  # of a user's own block: of any kind
        raise UserError(f"{layer.place}: {list(layer.args)} does not fit: {_reason(error)}; it is built as {_signature(block.cls)}") from error


def _signature(cls: type) -> str:
    parameters = inspect.signature(cls).parameters.values()
    return f"{cls.__name__}({', '.join(p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in parameters)})"


def _reason(error: Exception) -> str:
    """The first line of what went wrong, and where if it was in a plugin."""
    text = (str(error).strip().splitlines() or [""])[0]
    kind = "" if text and isinstance(error, TypeError | ValueError | RuntimeError) else f"{type(error).__name__}: "
    line = plugin_line(error)
    return f"{kind}{text}{f' (line {line} of the plugin)' if line else ''}"


def _width_scale(spec: ModelSpec) -> Scale:
    """YAML width -> a multiple of 8 times the width multiple; the head's own output count is left alone."""
    per_level = spec.anchors if isinstance(spec.anchors, int) else len(spec.anchors[0]) // 2
    outputs = per_level * (spec.nc + 5)

    def scale(width: Any) -> int:
        if isinstance(width, bool) or not isinstance(width, int) or width <= 0:
            raise ValueError(f"its width {width!r} is no positive whole number (expressions are not evaluated: write the number)")
        return width if width == outputs else math.ceil(width * spec.width_multiple / 8) * 8

    return scale


def _settle(modules: Iterable[nn.Module], act: nn.Module | None) -> None:
    """The family's batch-norm constants, and the YAML's activation in place of the default one."""
    for module in modules:
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = _BN_EPS, _BN_MOMENTUM
        if act and isinstance(module, Conv) and isinstance(module.act, nn.SiLU):
            module.act = copy.deepcopy(act)


def _run(layer: LayerSpec, module: nn.Module, inputs: Any, work: _Work) -> Any:
    """The row's output, or an error that names the row."""
    hooks = [leaf.register_forward_pre_hook(work.add) for leaf in module.modules() if not any(leaf.children())]
    try:
        return module(inputs)
    except Exception as error:  # of a user's own block: of any kind
        shapes = " and ".join(str(_shape(x)) for x in (inputs if isinstance(inputs, list) else [inputs]))
        given = f"{'a list of inputs' if isinstance(inputs, list) else 'an input'} of shape {shapes}"
        raise UserError(f"{layer.place}: fails on {given} (channels, height, width): {_reason(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()


class _Work:
    """Counts what the layers are about to do, and stops before one that would take all memory or forever."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        is_conv, is_transposed = isinstance(module, nn.Conv2d), isinstance(module, nn.ConvTranspose2d)
        if not isinstance(x, Tensor) or x.dim() != 4 or not (is_conv or is_transposed or type(module).__module__.startswith("torch.nn")):
            return
        # No layer's sides exceed this: upsampling and transposed convolution multiply, padding adds, the others only shrink.
        stride = max(_largest(module, "stride"), 1)
        factor = stride if is_transposed else max(_largest(module, "scale_factor"), 1) / stride
        side = max(*x.shape[2:], _largest(module, "size"), _largest(module, "output_size")) * factor + 2 * _largest(module, "padding")
        values = (module.out_channels if is_conv or is_transposed else x.shape[1]) * int(side) ** 2
        self.total += values * (module.weight[0].numel() if is_conv else max(int(_largest(module, "kernel_size")), 1) ** 2)
        if values > _MOST_VALUES or self.total > _MOST_WORK:
            raise ValueError(f"an output of up to {values:,} values, {self.total:,} operations up to here, are beyond every machine; "
                             "is a number mistyped?")


def _largest(module: nn.Module, attribute: str) -> float:
    """The largest number in a layer's setting, 0 where it has none."""
    value = getattr(module, attribute, 0)
    return max((v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, int | float)), default=0)


def _check_output(layer: LayerSpec, output: Any, width: Width) -> None:
    if isinstance(width, tuple):
        if not isinstance(output, tuple) or len(output) != len(width):
            raise UserError(f"{layer.place}: makes a {type(output).__name__}, not a tuple of {len(width)} tensors (batch, channels, height, width)")
        for level, channels in zip(output, width, strict=True):
            _check_output(layer, level, channels)
        return
    if not isinstance(output, Tensor):
        raise UserError(f"{layer.place}: makes a {type(output).__name__}, not one tensor (batch, channels, height, width)")
    if output.dim() != 4 or output.shape[1] != width:
        raise UserError(f"{layer.place}: makes a tensor of shape {tuple(output.shape)}, not (batch, {width}, height, width) as its channel rule says")


def _stride(raw: Tensor, detect: LayerSpec) -> int:
    height, width = raw.shape[2:4]
    if height != width or _DRY_RUN_PX % height:
        raise UserError(f"{detect.place}: a level of {height} x {width} cells for an image of {_DRY_RUN_PX} x {_DRY_RUN_PX} has no whole stride; "
                        "check the strides and the padding of the rows before it")
    return _DRY_RUN_PX // height
