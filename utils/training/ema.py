"""Exponential moving average of a network's weights."""
from __future__ import annotations

import copy
import math

import torch
from torch import nn


class ModelEma:
    """Keeps `model`, a copy whose weights follow with decay 0.9999 (1 - exp(-updates / 2000)): young averages follow fast."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, ramp: int = 2000) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp, self.updates = decay, ramp, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        follow = 1 - self.decay * (1 - math.exp(-self.updates / self.ramp))
        own, new = self.model.state_dict(), model.state_dict()
        floats = [key for key, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[key] for key in floats], [new[key] for key in floats], follow)
        for key, value in own.items():
            if not value.is_floating_point():
                value.copy_(new[key])
