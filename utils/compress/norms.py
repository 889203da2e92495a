"""Batch-norm statistics of a network whose weights were changed."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Forget the running statistics and take the mean over these batches (EagleEye's adaptive batch norm: Li et al., ECCV 2020, section 3.3).

    Args:
        model: in eval mode, in which it stays.
        batches: images (B, 3, H, W) as it takes them.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative mean
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
