"""Feature distillation, channel by channel, between networks of any widths.

CWD: Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TEMPERATURE = 4.0  # softens a channel's map, so that all that it responds to counts and not its brightest place alone


def channelwise_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence between each channel's distribution over the places of an image, times the temperature squared; mean over channels and images.

    A channel's values become a distribution by a softmax over its map, so that only *where* it responds is taught, not its offset; zero where
    student and teacher agree.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H', W'), resampled to the student's grid where it has another.
    """
    if teacher.shape[2:] != student.shape[2:]:
        teacher = F.interpolate(teacher.float(), student.shape[2:], mode="bilinear", align_corners=False)
    own, wanted = ((x.float().flatten(2) / _TEMPERATURE).log_softmax(2) for x in (student, teacher))
    return F.kl_div(own, wanted, reduction="sum", log_target=True) * _TEMPERATURE**2 / (own.shape[0] * own.shape[1])


class Adapters(nn.ModuleList):
    """From the student's widths to a teacher's: a 1x1 convolution for each level where they differ.

    They learn with the student and are no part of it. Without a bias: the divergence is blind to a channel's offset.
    """

    def __init__(self, widths: Sequence[int], teacher_widths: Sequence[int]) -> None:
        super().__init__(nn.Identity() if own == other else nn.Conv2d(own, other, 1, bias=False)
                         for own, other in zip(widths, teacher_widths, strict=True))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [adapt(x) for adapt, x in zip(self, features, strict=True)]


def feature_loss(adapted: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """Mean over levels of the divergence between the student's adapted maps and a teacher's."""
    return torch.stack([channelwise_divergence(x, y) for x, y in zip(adapted, features, strict=True)]).mean()
