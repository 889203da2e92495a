"""Optimizers with YOLOv5's three parameter groups."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from utils.errors import UserError
from utils.hyp import Hyp
from utils.training.schedule import NOMINAL_BATCH, StepSettings, accumulation


def freeze_rows(model: nn.Module, freeze: tuple[int, ...]) -> None:
    """YOLOv5's rule: one number freezes that many first rows, several name the rows.

    Raises:
        UserError: a row that the network has not, or nothing left to train.
    """
    rows, count = freeze if len(freeze) > 1 else range(freeze[0]), len(model.model)
    if min(freeze) < 0 or max(rows, default=0) >= count:
        raise UserError(f"--freeze {' '.join(map(str, freeze))}: the network's rows are 0 to {count - 1}")
    for row in rows:
        model.model[row].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {' '.join(map(str, freeze))}: leaves nothing to train")


def build_optimizer(model: nn.Module, name: str, hyp: Hyp, batch_size: int, fused: bool = True) -> torch.optim.Optimizer:
    """SGD (Nesterov), Adam or AdamW over biases, weights (decayed) and the rest (norms, scales, tables of positions), in this order.

    Args:
        fused: one kernel for all weights; not with fp16's scaler, as PyTorch's fused SGD whose first step is skipped goes on from momentum that
            was never filled.

    The decay is for a batch of NOMINAL_BATCH: it scales with the batch that accumulation really reaches.
    """
    biases, weights, others = [], [], []
    for key, parameter in model.named_parameters():
        group = biases if key.endswith("bias") else weights if key.endswith("weight") and parameter.ndim > 1 else others
        group.append(parameter)
    decay = hyp.weight_decay * batch_size * accumulation(batch_size) / NOMINAL_BATCH
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=hyp.lr0, momentum=hyp.momentum, nesterov=True, fused=fused)
    cls = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return cls(groups, lr=hyp.lr0, betas=(hyp.momentum, 0.999), fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up a saved state, each tensor laid out in memory like its parameter: a fused step pairs the two by place, and files hold plain order."""
    groups = state.get("param_groups", ())
    if len(groups) == len(optimizer.param_groups):  # fused is of this run's precision, not of the one before: it says where Adam counts
        groups = [saved | {"fused": own["fused"]} for saved, own in zip(groups, optimizer.param_groups, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if value is not None and value.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter).copy_(value)


def apply_step(optimizer: torch.optim.Optimizer, step: StepSettings) -> None:
    """Set the groups' learning rates and momentum."""
    for n, group in enumerate(optimizer.param_groups):
        group["lr"] = step.bias_lr if n == 0 else step.weight_lr
        if "momentum" in group:
            group["momentum"] = step.momentum
        else:
            group["betas"] = (step.momentum, group["betas"][1])
