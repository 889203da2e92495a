"""Distillation: a network learns from the labels and from what trained ones say of the same images.

Of the outputs, where the teacher sees an object: after Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation (NeurIPS
2017), and Mehta & Ozturk, Object Detection at 200 Frames Per Second (ECCVW 2018), whose objectness-scaled loss keeps background boxes from
dominating. Of the features: see features.py.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.config import TrainConfig
from utils.device import PRECISION, compute_dtype
from utils.log import info
from utils.training.ciou import ciou
from utils.training.features import Adapters, feature_loss
from utils.training.loss import DetectionLoss, Loss, box_of
from utils.training.teacher import SoftLevel, Taught, Teacher, head_inputs


class Lesson(NamedTuple):
    """The student's answer to a batch and its teachers'."""

    maps: list[Tensor]  # of the student, raw
    adapted: list[list[Tensor]]  # for each teacher the maps that the student's head reads, as wide as the teacher's; empty if not asked for
    taught: list[Taught]  # by each teacher


class Distillation(nn.Module):
    """A student with its teachers: images in, a `Lesson` out.

    Only the student and the adapters are modules of it: the teachers are in no state, no gradient and no exchange between processes.
    """

    def __init__(self, student: nn.Module, teachers: Sequence[Teacher], gain: float, feature_gain: float) -> None:
        super().__init__()
        self.student, self.teachers, self.gain, self.feature_gain = student, tuple(teachers), gain, feature_gain
        widths = [conv.in_channels for conv in student.head.m]
        self.adapters = nn.ModuleList(Adapters(widths, teacher.widths) for teacher in teachers if feature_gain)
        self.adapters.to(student.head.anchors.device)

    def forward(self, images: Tensor) -> Lesson:
        taught = [teacher(images) for teacher in self.teachers]  # first: what they compute is gone before the student's must be kept
        with head_inputs(self.student) as features:
            maps = self.student(images)
        return Lesson(maps, [adapt(features) for adapt in self.adapters], taught)

    def criterion(self, labels: DetectionLoss) -> DistillationLoss:
        return DistillationLoss(labels, self.gain, self.feature_gain)


class DistillationLoss:
    """A `Lesson` and targets to a loss: the labels' parts, then the distillation's.

    Several teachers' losses are averaged rather than their outputs: of objectness and classes the gradient is that of the mean probability, as
    cross-entropy is linear in its target, and no box is taught that lies between two and is no teacher's.
    """

    def __init__(self, labels: DetectionLoss, gain: float, feature_gain: float) -> None:
        self.labels, self.gain, self.feature_gain = labels, gain, feature_gain
        self.names = (*labels.names, *(name for name, on in (("distill", gain), ("features", feature_gain)) if on))

    def __call__(self, lesson: Lesson, targets: Tensor) -> Loss:
        loss, more = self.labels(lesson.maps, targets), []
        if self.gain:
            more.append(self.gain * torch.stack([output_loss(lesson.maps, taught.levels, self.labels) for taught in lesson.taught]).mean())
        if self.feature_gain:
            pairs = zip(lesson.adapted, lesson.taught, strict=True)
            more.append(self.feature_gain * torch.stack([feature_loss(adapted, taught.features) for adapted, taught in pairs]).mean())
        parts = torch.stack(more)
        return Loss(loss.total + parts.sum() * len(lesson.maps[0]), torch.cat((loss.parts, parts.detach())))


def output_loss(maps: Sequence[Tensor], levels: Sequence[SoftLevel], labels: DetectionLoss) -> Tensor:
    """The labels' loss with a teacher in their place: the same terms, level weights and gains, so that a gain of 1 weighs both alike.

    Box: 1 - CIoU to the teacher's box. Classes: their divergence. Both at the places where the teacher sees an object, weighted by its objectness.
    Objectness: its divergence, at all places. All are zero, as are their gradients, where student and teacher agree.

    Args:
        maps: L x (B, A, H, W, 5 + C) raw, of the student.
    """
    box = obj = cls = labels.anchors.new_zeros(())
    for raw, soft, anchors, weight in zip(maps, levels, labels.anchors, labels.level_weights, strict=True):
        obj = obj + weight * divergence(raw[..., 4].float(), soft.objectness).mean()
        if len(soft.image):
            place = soft.image, soft.anchor, soft.row, soft.column
            predicted, share = raw[place].float(), soft.objectness[place]  # (M, 5 + C), (M,)
            share = share / share.sum()
            box = box + (share * (1 - ciou(box_of(predicted, anchors[soft.anchor]), soft.cxcywh))).sum()
            if soft.cls.shape[1] > 1:  # of a single class, objectness says it all
                cls = cls + (share * divergence(predicted[:, 5:], soft.cls).mean(1)).sum()
    return (torch.stack((box, obj, cls)) * labels.gains).sum()


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of sigmoid(logits) from `wanted`, each the probability of a yes: the cross-entropy less its least value, `wanted`'s entropy."""
    entropy = -(torch.xlogy(wanted, wanted) + torch.xlogy(1 - wanted, 1 - wanted))
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") - entropy


def build_distillation(student: nn.Module, networks: Sequence[nn.Module], config: TrainConfig, device: torch.device) -> Distillation:
    """The student, on its device, beside the networks of `config.teacher`.

    Raises:
        UserError: a teacher of other classes, levels or numbers of anchors.
    """
    dtype, imgsz = compute_dtype("auto", device), config.teacher_imgsz or config.imgsz
    teachers = []
    for network, origin in zip(networks, config.teacher, strict=True):
        teachers.append(Teacher(network, origin, student, device, dtype, imgsz / config.imgsz))
        info(f"teacher: {origin} ({sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters) at {imgsz} px, {PRECISION[dtype]}")
    return Distillation(student, teachers, config.distill, config.distill_features)
