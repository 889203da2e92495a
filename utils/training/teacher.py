"""A trained network as a teacher: what it says of a batch, laid on the cells and anchors of another."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.device import autocast
from utils.errors import UserError
from utils.training.loss import box_of

_SEEN = 0.05  # objectness below which a teacher says nothing of boxes and classes: the many places of background would together outweigh objects
_MOST_NAMES = 5  # that a message lists


class SoftLevel(NamedTuple):
    """What a teacher says of one of the student's levels; M places where it sees an object."""

    objectness: Tensor  # (B, A, H, W) 0..1
    image: Tensor  # (M,) int64
    anchor: Tensor  # (M,) int64, the student's
    row: Tensor  # (M,) int64 cell
    column: Tensor  # (M,) int64 cell
    cxcywh: Tensor  # (M, 4) centre from the cell's corner and size, in the student's cells
    cls: Tensor  # (M, C) 0..1


class Taught(NamedTuple):
    """What a teacher says of a batch, level by level of the student."""

    levels: list[SoftLevel]
    features: list[Tensor]  # (B, C, H', W') the maps that its head reads, on its own grid


class Teacher:
    """A network that runs once an image, fused and without gradients.

    Its levels teach those of the same stride, its anchors those of the like shape.

    Args:
        network: a trained DetectionModel; see models/yolo.py.
        origin: its file, for messages.
        student: the DetectionModel to teach.
        scale: the teacher's image size as a multiple of the student's.

    Raises:
        UserError: its classes, strides or number of anchors are not the student's.
    """

    def __init__(self, network: nn.Module, origin: str, student: nn.Module, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> None:
        check_classes(network.names, student.names, f"--teacher {origin}", "use a teacher of the data's classes")
        if missing := [s for s in student.strides if s not in network.strides]:
            raise UserError(f"--teacher {origin}: predicts at strides {_listed(network.strides)}, the network also at {_listed(missing)}: "
                            "teacher and student need the same levels")
        if network.head.num_anchors != student.head.num_anchors:
            raise UserError(f"--teacher {origin}: has {network.head.num_anchors} anchors a level, the network {student.head.num_anchors}: "
                            "teacher and student need equally many")
        self.dtype, self.scale, self.student_strides = dtype, scale, student.strides
        self.own_levels = [network.strides.index(stride) for stride in student.strides]
        anchors = network.head.anchors[self.own_levels]
        self.orders = [match_anchors(level, own).to(device) for level, own in zip(student.head.anchors, anchors, strict=True)]
        self.anchors = [own.to(device)[order] for own, order in zip(anchors, self.orders, strict=True)]
        self.network = network.fused().requires_grad_(False).to(device, memory_format=torch.channels_last)

    @property
    def widths(self) -> list[int]:
        """Channels of `Taught.features`."""
        return [self.network.head.m[level].in_channels for level in self.own_levels]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Taught:
        """The student's images (B, 3, H, W), 0..1, whole strides."""
        height, width = images.shape[2:]
        with autocast(images.device, self.dtype), head_inputs(self.network) as features:
            maps = self.network(self._resized(images))
        levels = [
            soft_level(maps[own], order, anchors, (height // stride, width // stride))
            for own, order, anchors, stride in zip(self.own_levels, self.orders, self.anchors, self.student_strides, strict=True)
        ]
        return Taught(levels, [features[own] for own in self.own_levels])

    def _resized(self, images: Tensor) -> Tensor:
        """The images at the teacher's size, each side in whole strides of its own."""
        stride = self.network.max_stride
        size = tuple(max(round(side * self.scale / stride), 1) * stride for side in images.shape[2:])
        return images if size == images.shape[2:] else F.interpolate(images, size, mode="bilinear", align_corners=False)


@contextmanager
def head_inputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block: a list that a forward pass fills with the maps (B, C, H, W) that the network's head reads.

    The hook is there for the block only, so that no copy of the network carries it.
    """
    kept: list[Tensor] = []
    hook = network.head.register_forward_pre_hook(lambda _, inputs: kept.extend(inputs[0]))
    try:
        yield kept
    finally:
        hook.remove()


def soft_level(raw: Tensor, order: Tensor, anchors: Tensor, grid: tuple[int, int]) -> SoftLevel:
    """A teacher's map on the student's grid.

    Of the teacher's cells that a student's cell overlaps, the one with the highest objectness speaks: where the grids are equal, that is the same
    cell. A cell that could not predict the box's centre (it reaches half a cell beyond its border) is background, as it is by the labels' rule.

    Args:
        raw: (B, A, H', W', 5 + C) of the teacher.
        order: (A,) the teacher's anchor for each of the student's.
        anchors: (A, 2) the teacher's, in this order and in its cells.
        grid: height and width of the student's level.
    """
    own_height, own_width = raw.shape[2:4]
    objectness, source = F.adaptive_max_pool2d(raw[..., 4][:, order].float().sigmoid(), grid, return_indices=True)
    image, anchor, row, column = (objectness >= _SEEN).nonzero(as_tuple=True)
    place = source[image, anchor, row, column]
    own_row, own_column = place // own_width, place % own_width
    predicted = raw[image, order[anchor], own_row, own_column].float()  # (M, 5 + C)
    scale = predicted.new_tensor((grid[1] / own_width, grid[0] / own_height))  # the student's cells in one of the teacher's
    box = box_of(predicted, anchors[anchor])
    shift = torch.stack((own_column, own_row), 1) * scale - torch.stack((column, row), 1)
    cxcywh = torch.cat((box[:, :2] * scale + shift, box[:, 2:] * scale), 1)

    reached = ((cxcywh[:, :2] >= -0.5) & (cxcywh[:, :2] <= 1.5)).all(1)
    objectness[tuple(index[~reached] for index in (image, anchor, row, column))] = 0
    parts = (image, anchor, row, column, cxcywh, predicted[:, 5:].sigmoid())
    return SoftLevel(objectness, *(part[reached] for part in parts))


def match_anchors(student: Tensor, teacher: Tensor) -> Tensor:
    """(A,) the teacher's anchor for each of the student's, both (A, 2): the pair of the likest shapes first, each anchor once.

    Sides are compared as ratios and apart from the level's mean size, so that anchors fitted at another image size match as well.
    """
    student, teacher = (anchors.detach().cpu().double().log() for anchors in (student, teacher))
    distance = ((student - student.mean())[:, None] - (teacher - teacher.mean())[None]).square().sum(2)
    order = torch.zeros(len(student), dtype=torch.long)
    for _ in range(len(student)):
        own, other = divmod(int(distance.argmin()), len(teacher))
        order[own] = other
        distance[own], distance[:, other] = math.inf, math.inf
    return order


def check_classes(names: Sequence[str], wanted: Sequence[str], place: str, mend: str) -> None:
    """Refuse a network of other classes than the data's: the same names in the same order, upper and lower case being one.

    Raises:
        UserError: the line names both lists, or the first class that differs in long ones.
    """
    pairs = [(a.strip().casefold(), b.strip().casefold()) for a, b in zip(names, wanted, strict=False)]
    differing = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if len(names) == len(wanted) and differing is None:
        return
    first = f" (class {differing} is {names[differing]} there, {wanted[differing]} here)" if differing is not None else ""
    raise UserError(f"{place}: knows the {len(names)} classes {_listed(names)}, the data has the {len(wanted)} classes {_listed(wanted)}"
                    f"{first}: {mend}; if only the names differ, write them alike in the data YAML")


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:_MOST_NAMES])) + (" …" if len(values) > _MOST_NAMES else "")
