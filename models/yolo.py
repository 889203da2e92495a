"""spec -> network: `DetectionModel` wires the rows of a ModelSpec; `load_model` rebuilds one from a checkpoint."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.build import build_rows, inputs_of, narrow_rows
from models.fuse import fold, fuse
from models.head import Detect, decode, in_order_of
from models.narrow import widths_of
from models.spec import IMAGE, LayerSpec, ModelSpec, load_spec
from utils.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from utils.errors import UserError
from utils.log import info


class DetectionModel(nn.Module):
    """A detector built from a spec: images (B, 3, H, W) in 0..1 -> raw maps, one (B, A, H/s, W/s, 5 + nc) for each level.

    Attributes:
        max_stride: image sides must be multiples of it, pixels.
        spec: the data it was built from, and can be built from again.
        names: class names, `nc` of them.
        row_shapes: (C, H, W) of each row but Detect for an image of 256 x 256; of each level where a row makes several.
        model: one module for each row, so that keys read `model.{row}.…`.
    """

    def __init__(self, spec: ModelSpec, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.names = tuple(names) if names else tuple(str(i) for i in range(spec.nc))
        if len(self.names) != spec.nc:
            raise UserError(f"{spec.origin}: {spec.nc} classes but {len(self.names)} names")
        rows = build_rows(spec)
        self.model = nn.ModuleList(rows.modules)
        self.row_shapes = rows.shapes
        self.max_stride = rows.max_stride
        last_use = {layer.row: layer.row for layer in spec.layers[:-1]} | {source: layer.row for layer in spec.layers for source in layer.sources}
        self._last_used = [[source for source, row in last_use.items() if row == layer.row] for layer in spec.layers]
        if spec.fused:
            fold(self.eval(), 2 * self.max_stride)
            self.train().requires_grad_(True)
            if spec.widths:
                self.row_shapes = narrow_rows(spec, self.model)
        self.head.set_strides(rows.strides)

    @property
    def head(self) -> Detect:
        return self.model[-1]

    @property
    def unread_rows(self) -> list[LayerSpec]:
        """Rows from which nothing reaches the head."""
        read = {self.spec.layers[-1].row}
        for layer in reversed(self.spec.layers):
            read.update(layer.sources if layer.row in read else ())
        return [layer for layer in self.spec.layers if layer.row not in read]

    @property
    def strides(self) -> tuple[int, ...]:
        return self.head.strides

    def forward(self, images: Tensor) -> list[Tensor]:
        kept: dict[int, Any] = {IMAGE: images}
        for layer, module, done in zip(self.spec.layers, self.model, self._last_used, strict=True):
            kept[layer.row] = module(inputs_of(layer, kept))
            for row in done:  # a map that nobody waits for would only take memory, and a CPU's caches
                del kept[row]
        return kept[len(self.model) - 1]

    @property
    def anchors_px(self) -> Tensor:
        """(levels, A, 2) width and height in pixels."""
        return self.head.anchors * self.head.anchors.new_tensor(self.strides).view(-1, 1, 1)

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Use other anchors (levels, A, 2); the spec follows, so that a checkpoint tells them."""
        anchors_px = in_order_of(self.strides, anchors_px)
        self.head.anchors.copy_(anchors_px.to(self.head.anchors) / self.head.anchors.new_tensor(self.strides).view(-1, 1, 1))
        levels = tuple(tuple(round(v, 2) for v in level.flatten().tolist()) for level in anchors_px)
        self.spec = dataclasses.replace(self.spec, anchors=levels)

    @property
    def pad_stride(self) -> int:
        """Images are padded to multiples of it: the largest stride, at least 32."""
        return max(self.max_stride, 32)

    def whole_strides(self, imgsz: int) -> int:
        """The image size that the network really takes: rounded up to a multiple of `max_stride`."""
        return math.ceil(imgsz / self.max_stride) * self.max_stride

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Raw maps to boxes (B, N, 5 + nc): cx, cy, w, h in pixels, objectness, class probabilities."""
        return decode(maps, self.head.anchors, self.strides)

    def fused(self) -> DetectionModel:
        """A copy for inference, batch norms folded away."""
        return fuse(self, 2 * self.max_stride)

    def folded(self) -> DetectionModel:
        """The fused network as one to train and to keep: all of it learns, and its spec says what it is. Itself if it is one already."""
        if self.spec.fused:
            return self
        model = self.fused().requires_grad_(True)
        model.spec = dataclasses.replace(self.spec, fused=True, widths={})
        if self.spec.widths:
            whole = DetectionModel(model.spec, self.names)
            model.spec = dataclasses.replace(model.spec, widths=widths_of(model.model, whole.model, self.spec.widths))
        return model


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


def check_network(cfg: str, weights: str) -> None:
    """What can be said of them before any data are read.

    Raises:
        UserError: neither is given, one is not there, or the YAML has a mistake.
    """
    if not cfg and not weights:
        raise UserError("name a network: --cfg yolov5s-ghost.yaml, or weights to start from: --weights best.pt")
    if cfg:
        load_spec(cfg)
    if weights:
        find_checkpoint(weights)


def build_for_training(cfg: str, weights: str, names: Sequence[str]) -> tuple[DetectionModel, Transfer | None]:
    """The network to train for these classes: of a YAML, of a checkpoint, or of a YAML with a checkpoint's fitting weights.

    Raises:
        UserError: one of them is not what it should be.
    """
    checkpoint = load_checkpoint(weights) if weights else None
    spec = load_spec(cfg, len(names)) if cfg else ModelSpec.from_dict(checkpoint.spec, str(weights), len(names))
    model = DetectionModel(spec, names)
    # A YAML that is named brings its own anchors; otherwise weights keep those that they were trained with.
    taken = {key: value for key, value in checkpoint.state_dict.items() if not (cfg and key.endswith(".anchors"))} if checkpoint else {}
    if cfg:
        _load_pretrained(model, taken)
    return model, transfer_weights(model, taken) if checkpoint else None


def _load_pretrained(model: DetectionModel, taken: Mapping[str, Tensor]) -> None:
    """Rows that can start from weights of their own (`load_pretrained()`) take those that their arguments name; pruned rows have no such weights,
    and a row that a checkpoint fills wholly needs none."""
    pruned = {int(name.partition(".")[0]) for name in model.spec.widths}
    for layer, module in zip(model.spec.layers, model.model, strict=True):
        if hasattr(module, "load_pretrained"):
            prefix = f"model.{layer.row}."
            if all((key := prefix + name) in taken and taken[key].shape == own.shape for name, own in module.state_dict().items()):
                continue
            if layer.row in pruned:
                info(f"{layer.place}: starts from random weights: pretrained ones are for its whole width")
                continue
            try:
                module.load_pretrained()
            except UserError as error:
                raise UserError(f"{layer.place}: {error}") from error


def model_from_checkpoint(checkpoint: Checkpoint, origin: str) -> DetectionModel:
    """Rebuild a checkpoint's network, float32, in eval mode.

    Raises:
        UserError: its spec and its tensors disagree.
    """
    model = DetectionModel(ModelSpec.from_dict(checkpoint.spec, origin), checkpoint.names)
    transfer = transfer_weights(model, checkpoint.state_dict)
    if transfer.left:
        raise UserError(f"{origin}: its tensors are not those of its own network: {transfer}")
    return model.eval()


def load_model(path: str) -> DetectionModel:
    """The network of a checkpoint file (ours or a YOLOv5 .pt), float32, in eval mode.

    Raises:
        UserError: no such file, not a checkpoint, damaged or hostile.
    """
    return model_from_checkpoint(load_checkpoint(path), str(path))
