"""Which cells and anchors learn which target: the YOLOv5 rule (a shape ratio below a threshold; the own cell and the nearest neighbours)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Of a target: its own cell and the next one left, above, right, below.
_NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))


class Matches(NamedTuple):
    """The M matches of one level; a target may appear many times, on several anchors and cells."""

    image: Tensor  # (M,) int64
    anchor: Tensor  # (M,) int64
    row: Tensor  # (M,) int64 cell
    column: Tensor  # (M,) int64 cell
    cxcywh: Tensor  # (M, 4) centre from the cell's corner and size, in cells
    anchor_wh: Tensor  # (M, 2) in cells
    cls: Tensor  # (M,) int64


def assign(targets: Tensor, anchors: Tensor, grids: Sequence[tuple[int, int]], anchor_t: float) -> list[Matches]:
    """Matches of every level.

    Args:
        targets: (T, 6) image, class, cx, cy, w, h, normalised; T may be 0.
        anchors: (L, A, 2) in cells of each level.
        grids: height and width of each level in cells.
        anchor_t: an anchor fits a target when no side is longer than the other's by this factor.
    """
    return [_assign_level(targets, level, *grid, anchor_t) for level, grid in zip(anchors, grids, strict=True)]


def _assign_level(targets: Tensor, anchors: Tensor, height: int, width: int, anchor_t: float) -> Matches:
    cells = targets.new_tensor((width, height))
    wh = targets[:, 4:] * cells
    ratio = wh[None] / anchors[:, None]  # (A, T, 2)
    anchor, target = (torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t).nonzero(as_tuple=True)

    xy = targets[target, 2:4] * cells
    own = xy.floor().clamp(min=0)
    own = torch.minimum(own, cells - 1)  # a centre on the far border belongs to the last cell
    inside = xy - own
    left, above = (inside < 0.5).unbind(1)
    use = torch.stack((torch.ones_like(left), left, above, ~left, ~above))  # (5, M)
    cell = own[None] + own.new_tensor(_NEIGHBOURS)[:, None]  # (5, M, 2)
    use &= ((cell >= 0) & (cell < cells)).all(2)

    offset, match = use.nonzero(as_tuple=True)
    cell, anchor, target = cell[offset, match], anchor[match], target[match]
    column, row = cell.long().unbind(1)
    cxcywh = torch.cat((xy[match] - cell, wh[target]), 1)
    return Matches(targets[target, 0].long(), anchor, row, column, cxcywh, anchors[anchor], targets[target, 1].long())
