"""The Detect head (raw maps) and the pure function that turns its maps into boxes."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.registry import Scale, Wiring, register


def _detect_inputs(inputs: Sequence[int], args: list, scale: Scale) -> Wiring:
    if len(args) != 2:
        raise ValueError(f"takes [nc, anchors], found {len(args)} arguments")
    return Wiring([*args, tuple(inputs)], 0)


@register("Detect", channels=_detect_inputs)
class Detect(nn.Module):
    """One 1x1 convolution a level: (B, C_l, H_l, W_l) maps -> raw (B, A, H_l, W_l, 5 + nc) maps, no sigmoid taken.

    `anchors` (levels, A, 2) is in units of the level's stride; `strides` is set once they are known.
    """

    def __init__(self, nc: int, anchors: int | Sequence[Sequence[float]], channels: Sequence[int]) -> None:
        super().__init__()
        self.nc = nc
        self.anchors_given = not isinstance(anchors, int)  # a bare count asks training to fit them
        if isinstance(anchors, int):
            # Squares from 1.5 to 6 strides: a neutral start, replaced by the data's own before training.
            sizes = [1.5 * 4 ** (i / max(anchors - 1, 1)) for i in range(anchors)]
            self._anchors_px = None
            units = torch.tensor([[[s, s] for s in sizes]] * len(channels))
        else:
            self._anchors_px = torch.tensor(anchors, dtype=torch.float32, device="cpu").view(len(channels), -1, 2)
            units = self._anchors_px.to(torch.get_default_device(), copy=True)
        self.register_buffer("anchors", units)
        self.strides: tuple[int, ...] = ()
        self.m = nn.ModuleList(nn.Conv2d(c, self.num_anchors * (5 + nc), 1) for c in channels)

    @property
    def num_anchors(self) -> int:
        return self.anchors.shape[1]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        maps = []
        for conv, x in zip(self.m, features, strict=True):
            cells = conv(x).permute(0, 2, 3, 1)
            # Views, not copies, by way of (B, H, W, A, 5 + nc): so channels-last maps lie in memory, PyTorch's and those of runtimes, where decoding
            # undoes the last permutation and then moves nothing.
            maps.append(cells.view(*cells.shape[:3], self.num_anchors, 5 + self.nc).permute(0, 3, 1, 2, 4))
        return maps

    def set_strides(self, strides: Sequence[int]) -> None:
        """Bring pixel anchors to stride units and start the biases at the expected rates of objects and classes (RetinaNet, section 4.1)."""
        self.strides = tuple(strides)
        if self._anchors_px is not None:
            pixels = in_order_of(strides, self._anchors_px)
            self.anchors.copy_(pixels / torch.tensor(strides, dtype=torch.float32, device="cpu").view(-1, 1, 1))
        for conv, stride in zip(self.m, strides, strict=True):
            bias = conv.bias.detach().view(self.num_anchors, 5 + self.nc)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)  # about 8 objects in a 640-pixel image
            bias[:, 5:] += math.log(0.6 / (self.nc - 0.99999))


def in_order_of(strides: Sequence[int], anchors_px: Tensor) -> Tensor:
    """Anchors (L, A, 2), small ones for fine levels: turned round as a whole, as YOLOv5 does, where they or the levels are listed the other way."""
    areas = anchors_px.prod(-1).mean(-1)
    return anchors_px.flip(0) if (areas[-1] - areas[0]) * (strides[-1] - strides[0]) < 0 else anchors_px


def decode(maps: Sequence[Tensor], anchors: Tensor, strides: Sequence[int]) -> Tensor:
    """Raw maps to boxes: L x (B, A, H, W, 5 + C) -> (B, sum of H*W*A, 5 + C), level by level, cell by cell.

    Columns: cx, cy, w, h in pixels of the network's input, objectness and class probabilities in 0..1 (float32).
    """
    batch, outputs = len(maps[0]), maps[0].shape[-1]
    decoded = torch.empty(batch, sum(raw[0, ..., 0].numel() for raw in maps), outputs, device=maps[0].device)
    start = 0
    for raw, level_anchors, stride in zip(maps, anchors, strides, strict=True):
        _, num_anchors, height, width, _ = raw.shape
        end = start + num_anchors * height * width
        # In place and cell by cell, as channels-last maps lie in memory: with 80 classes the boxes outweigh the network's own feature maps.
        p = decoded[:, start:end].view(batch, height, width, num_anchors, outputs)
        torch.sigmoid(raw.float().permute(0, 2, 3, 1, 4), out=p)
        y, x = torch.meshgrid(torch.arange(height, device=raw.device), torch.arange(width, device=raw.device), indexing="ij")
        p[..., :2] = (p[..., :2] * 2 - 0.5 + torch.stack((x, y), -1)[:, :, None]) * stride
        p[..., 2:4] = (p[..., 2:4] * 2).square() * (level_anchors * stride)
        start = end
    return decoded
