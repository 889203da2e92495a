"""From a loss to moved weights: scaling, accumulation, clipping, the optimizer's step and the averaged copy."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.training.ema import ModelEma
from utils.training.optim import apply_step
from utils.training.schedule import StepSettings

_MAX_GRAD_NORM = 10.0


class Stepper:
    """Gathers gradients over batches and steps when `accumulate` of them are in.

    Args:
        penalty: adds to the gradients of so many images before each step, once they are unscaled and clipped.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEma, device: torch.device, dtype: torch.dtype,
                 penalty: Callable[[int], None] | None = None) -> None:
        self.model, self.optimizer, self.ema, self.device, self.dtype, self.penalty = model, optimizer, ema, device, dtype, penalty
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        # Only fp16 can underflow; elsewhere the scaler passes everything through.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._gathered = self._images = 0

    def moves_next(self, settings: StepSettings) -> bool:
        """The next batch's gradients complete a step."""
        return self._gathered + 1 >= settings.accumulate

    def backward(self, loss: Tensor, settings: StepSettings, images: int) -> None:
        """
        Args:
            images: that the loss sums over, in all processes.
        """
        moves = self.moves_next(settings)
        apply_step(self.optimizer, settings)
        self.scaler.scale(loss).backward()
        self._gathered += 1
        self._images += images
        if moves:
            self.step()

    def step(self) -> None:
        """Move the weights by what has been gathered; nothing if that is nothing."""
        if not self._gathered:
            return
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_GRAD_NORM)
        if self.penalty:
            self.penalty(self._images)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self._gathered = self._images = 0
