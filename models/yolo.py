"""spec -> network: `DetectionModel` wires the rows of a ModelSpec; `load_model` rebuilds one from a checkpoint."""
from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models.common  # noqa: F401  (registers the blocks)
from models.activations import parse_activation
from models.fuse import fuse
from models.head import Detect, decode
from models.layers import Conv
from models.registry import Block, Scale, find_block
from models.spec import IMAGE, LayerSpec, ModelSpec, load_spec
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.errors import UserError

_DRY_RUN_PX = 256  # the strides of any head up to P8 divide it
_BN_EPS, _BN_MOMENTUM = 1e-3, 0.03


class DetectionModel(nn.Module):
    """A detector built from a spec: images (B, 3, H, W) in 0..1 -> raw maps, one (B, A, H/s, W/s, 5 + nc) for each level.

    Attributes:
        spec: the data it was built from.
        names: class names, `nc` of them.
        model: one module for each row, so that keys read `model.{row}.…`.
    """

    def __init__(self, spec: ModelSpec, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.names = tuple(names) if names else tuple(str(i) for i in range(spec.nc))
        if len(self.names) != spec.nc:
            raise UserError(f"{spec.origin}: {spec.nc} classes but {len(self.names)} names")
        self.model = nn.ModuleList(_build_rows(spec))
        self._needed_later = {s for layer in spec.layers for s in layer.sources}
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = _BN_EPS, _BN_MOMENTUM
        if spec.activation:
            _replace_default_activation(self, parse_activation(spec.activation, spec.origin))
        self.row_shapes: list[tuple[int, ...]] = []  # (C, H, W) of each row at _DRY_RUN_PX
        self._dry_run()

    @property
    def head(self) -> Detect:
        return self.model[-1]

    @property
    def strides(self) -> tuple[int, ...]:
        return self.head.strides

    @property
    def max_stride(self) -> int:
        return max(self.strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        kept: dict[int, Tensor] = {IMAGE: images}
        for layer, module in zip(self.spec.layers, self.model, strict=True):
            x = module(_gather(kept, layer))
            if layer.row in self._needed_later:
                kept[layer.row] = x
        return x

    @property
    def anchors_px(self) -> Tensor:
        """(levels, A, 2) width and height in pixels."""
        return self.head.anchors * self.head.anchors.new_tensor(self.strides).view(-1, 1, 1)

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Use other anchors (levels, A, 2); the spec follows, so that a checkpoint tells them."""
        self.head.anchors.copy_(anchors_px.to(self.head.anchors) / self.head.anchors.new_tensor(self.strides).view(-1, 1, 1))
        levels = tuple(tuple(round(v, 2) for v in level.flatten().tolist()) for level in anchors_px)
        self.spec = dataclasses.replace(self.spec, anchors=levels)

    def whole_strides(self, imgsz: int) -> int:
        """The image size that the network really takes: rounded up to a multiple of its largest stride."""
        return math.ceil(imgsz / self.max_stride) * self.max_stride

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Raw maps to boxes (B, N, 5 + nc): cx, cy, w, h in pixels, objectness, class probabilities."""
        return decode(maps, self.head.anchors, self.strides)

    def fused(self) -> DetectionModel:
        """A copy for inference, batch norms folded away."""
        return fuse(self)

    @torch.no_grad()
    def _dry_run(self) -> None:
        """Find each row's shape, hence the strides; a row that fails there is named."""
        device = self.head.anchors.device
        self.eval()
        kept = {IMAGE: torch.zeros(1, 3, _DRY_RUN_PX, _DRY_RUN_PX, device=device)}
        for layer, module in zip(self.spec.layers, self.model, strict=True):
            inputs = _gather(kept, layer)
            try:
                kept[layer.row] = module(inputs)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                shapes = " and ".join(str(tuple(kept[s].shape[1:])) for s in layer.sources)
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise UserError(f"{layer.place}: fails on inputs of shape {shapes} (channels, height, width): {reason}") from None
        self.train()
        maps = kept.pop(len(self.model) - 1)
        self.row_shapes = [tuple(kept[row].shape[1:]) for row in range(len(self.model) - 1)]
        self.head.set_strides([_DRY_RUN_PX // raw.shape[2] for raw in maps])


def _gather(kept: dict[int, Tensor], layer: LayerSpec) -> Tensor | list[Tensor]:
    return [kept[s] for s in layer.source] if isinstance(layer.source, tuple) else kept[layer.source]


def _build_rows(spec: ModelSpec) -> list[nn.Module]:
    widths: dict[int, int] = {IMAGE: 3}
    scale = _width_scale(spec)
    modules = []
    for layer in spec.layers:
        module, widths[layer.row] = _build_row(layer, [widths[s] for s in layer.sources], scale)
        modules.append(module)
    return modules


def _build_row(layer: LayerSpec, inputs: list[int], scale: Scale) -> tuple[nn.Module, int]:
    """The module of one row and its output channels."""
    try:
        block = find_block(layer.module)
    except UserError as error:
        raise UserError(f"{layer.place}: {error}") from None
    copies = []
    for _ in range(1 if block.repeats == "inside" else layer.repeats):
        module, width = _build_block(block, layer, inputs, scale)
        copies.append(module)
        inputs = [width]
    return (copies[0] if len(copies) == 1 else nn.Sequential(*copies)), width


def _build_block(block: Block, layer: LayerSpec, inputs: list[int], scale: Scale) -> tuple[nn.Module, int]:
    try:
        args, width = block.channels(inputs, list(layer.args), scale)
        if block.repeats == "inside":
            args.insert(2, layer.repeats)
        inspect.signature(block.cls).bind(*args, **layer.kwargs)
        return block.cls(*args, **layer.kwargs), width
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        raise UserError(f"{layer.place}: {list(layer.args)} does not fit: {error}; it is built as {_signature(block.cls)}") from None


def _signature(cls: type) -> str:
    parameters = inspect.signature(cls).parameters.values()
    return f"{cls.__name__}({', '.join(p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in parameters)})"


def _width_scale(spec: ModelSpec) -> Scale:
    """YAML width -> a multiple of 8 times the width multiple; the head's own output count is left alone."""
    per_level = spec.anchors if isinstance(spec.anchors, int) else len(spec.anchors[0]) // 2
    outputs = per_level * (spec.nc + 5)

    def scale(width: Any) -> int:
        if isinstance(width, bool) or not isinstance(width, int) or width <= 0:
            raise ValueError(f"its width {width!r} is no positive whole number (expressions are not evaluated: write the number)")
        return width if width == outputs else math.ceil(width * spec.width_multiple / 8) * 8

    return scale


def _replace_default_activation(model: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Conv) and isinstance(module.act, nn.SiLU):
            module.act = copy.deepcopy(new)


class Transfer(NamedTuple):
    """What a network took of other weights."""

    taken: int
    total: int
    left: tuple[str, ...]  # keys of the network that kept their own values

    def __str__(self) -> str:
        rest = f"; not taken: {', '.join(self.left[:4])}{' …' if len(self.left) > 4 else ''}" if self.left else ""
        return f"{self.taken} of {self.total} tensors taken{rest}"


def transfer_weights(model: DetectionModel, weights: dict[str, Tensor]) -> Transfer:
    """Copy every tensor of equal name and shape; with another head the rest keeps its start values."""
    own = model.state_dict()
    matching = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(matching, strict=False)
    return Transfer(len(matching), len(own), tuple(key for key in own if key not in matching))


def build_for_training(cfg: str, weights: str, names: Sequence[str]) -> tuple[DetectionModel, Transfer | None]:
    """The network to train for these classes: of a YAML, of a checkpoint, or of a YAML with a checkpoint's fitting weights.

    Raises:
        UserError: neither is given, or one of them is not what it should be.
    """
    if not cfg and not weights:
        raise UserError("name a network: --cfg yolov5s-ghost.yaml, or weights to start from: --weights best.pt")
    checkpoint = load_checkpoint(weights) if weights else None
    spec = load_spec(cfg, len(names)) if cfg else ModelSpec.from_dict(checkpoint.spec, str(weights), len(names))
    model = DetectionModel(spec, names)
    if checkpoint is None:
        return model, None
    # A YAML that is named brings its own anchors; otherwise weights keep those that they were trained with.
    taken = {key: value for key, value in checkpoint.state_dict.items() if not (cfg and key.endswith(".anchors"))}
    return model, transfer_weights(model, taken)


def model_from_checkpoint(checkpoint: Checkpoint, origin: str) -> DetectionModel:
    """Rebuild a checkpoint's network, float32, in eval mode.

    Raises:
        UserError: its spec and its tensors disagree.
    """
    model = DetectionModel(ModelSpec.from_dict(checkpoint.spec, origin), checkpoint.names)
    transfer = transfer_weights(model, {key: value.float() if value.is_floating_point() else value for key, value in checkpoint.state_dict.items()})
    if transfer.left:
        raise UserError(f"{origin}: its tensors are not those of its own network: {transfer}")
    return model.eval()


def load_model(path: str) -> DetectionModel:
    """The network of a checkpoint file (ours or a YOLOv5 .pt), float32, in eval mode.

    Raises:
        UserError: no such file, not a checkpoint, damaged or hostile.
    """
    return model_from_checkpoint(load_checkpoint(path), str(path))
