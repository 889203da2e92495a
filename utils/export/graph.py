"""The graph that leaves PyTorch: a network and its decoding as one module with one output."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Detector(Protocol):
    """A module that finds objects and tells what its raw maps mean, such as models.yolo's DetectionModel."""

    names: Sequence[str]
    strides: Sequence[int]
    anchors_px: Tensor  # (levels, A, 2) width and height

    def __call__(self, images: Tensor) -> Sequence[Tensor]: ...


class InferenceGraph(nn.Module):
    """Images (B, 3, H, W) float32 in 0..1 -> boxes (B, N, 5 + C) float32: cx, cy, w, h in pixels, objectness, class probabilities.

    The decoding is written for converters (nothing in place, no branches) and always float32: the numbers and their order are those of
    the network's own `decode`.

    Args:
        network: for inference: fused, in eval mode.
        half: a copy of the network computes in fp16; images and boxes stay float32.
    """

    def __init__(self, network: Detector, *, half: bool = False) -> None:
        super().__init__()
        self.strides = tuple(network.strides)
        self.register_buffer("anchors_px", network.anchors_px.detach().float().clone())
        self.dtype = torch.float16 if half else torch.float32
        self.network = copy.deepcopy(network).half() if half else network
        self.eval()  # ONNX's exporter brings all that is in it back to the mode that it itself was in

    def forward(self, images: Tensor) -> Tensor:
        return decode_maps(self.network(images.to(self.dtype)), self.anchors_px, self.strides)


def decode_maps(maps: Sequence[Tensor], anchors_px: Tensor, strides: Sequence[int]) -> Tensor:
    """Raw maps to boxes: L x (B, A, H, W, 5 + C) -> (B, sum of H*W*A, 5 + C), level by level, cell by cell."""
    levels = []
    for raw, anchors, stride in zip(maps, anchors_px, strides, strict=True):
        height, width = raw.shape[2:4]
        p = raw.float().permute(0, 2, 3, 1, 4).sigmoid()  # (B, H, W, A, 5 + C)
        y, x = torch.meshgrid(torch.arange(height, device=raw.device), torch.arange(width, device=raw.device), indexing="ij")
        cells = torch.stack((x, y), -1)[:, :, None].float()  # (H, W, 1, 2)
        xy = (p[..., :2] * 2 - 0.5 + cells) * stride
        wh = (p[..., 2:4] * 2) * (p[..., 2:4] * 2) * anchors
        levels.append(torch.cat((xy, wh, p[..., 4:]), -1).flatten(1, 3))
    return torch.cat(levels, 1)
