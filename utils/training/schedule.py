"""Learning rate, momentum and accumulation as pure functions of progress."""
from __future__ import annotations

import math
from typing import NamedTuple

from utils.hyp import Hyp

NOMINAL_BATCH = 64  # the batch that the learning rate is tuned for
_MIN_WARMUP_STEPS = 100  # of the usual three epochs' warm-up; a shorter one's are as many fewer, or it would not be short on few images
_USUAL_WARMUP_EPOCHS = 3


def progress(epoch: int, epochs: int, seconds: float, limit_s: float) -> float:
    """How much of a training is behind, 0..1: of its epochs, or of its time limit (if any) where that is nearer."""
    return max(epoch / epochs, min(seconds / limit_s, 1.0) if limit_s else 0.0)


def decay(progress: float, last: float, cosine: bool) -> float:
    """Factor on the learning rate: 1 at progress 0, `last` at 1."""
    share = (1 + math.cos(math.pi * progress)) / 2 if cosine else 1 - progress
    return last + (1 - last) * share


def warmup_steps(hyp: Hyp, steps_per_epoch: int) -> int:
    return round(max(hyp.warmup_epochs * steps_per_epoch, _MIN_WARMUP_STEPS * min(hyp.warmup_epochs / _USUAL_WARMUP_EPOCHS, 1)))


class StepSettings(NamedTuple):
    """The settings of one step."""

    weight_lr: float
    bias_lr: float
    momentum: float
    accumulate: int  # batches to gather before the optimizer steps


def accumulation(batch_size: int) -> int:
    """Batches that make up the nominal one."""
    return max(round(NOMINAL_BATCH / batch_size), 1)


def settings(step: int, progress: float, warmup: int, batch_size: int, hyp: Hyp, cosine: bool) -> StepSettings:
    """Settings at a step counted from the start of training; during warm-up the weights' rate rises from 0, the biases' falls to meet it."""
    lr, accumulate = hyp.lr0 * decay(progress, hyp.lrf, cosine), accumulation(batch_size)
    if step >= warmup:
        return StepSettings(lr, lr, hyp.momentum, accumulate)
    t = step / warmup
    return StepSettings(lr * t, hyp.warmup_bias_lr + (lr - hyp.warmup_bias_lr) * t,
                        hyp.warmup_momentum + (hyp.momentum - hyp.warmup_momentum) * t, max(round(1 + (accumulate - 1) * t), 1))
