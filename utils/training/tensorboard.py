"""Scalars for TensorBoard, where it is installed (pip install tensorboard)."""
from __future__ import annotations

from pathlib import Path

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None


class Scalars:
    """Writes a row of results.csv as scalars into the run's folder; does nothing without TensorBoard."""

    def __init__(self, run_dir: Path) -> None:
        self._writer = SummaryWriter(str(run_dir)) if SummaryWriter else None

    def add(self, epoch: int, row: dict[str, float]) -> None:
        if self._writer:
            for key, value in row.items():
                if key != "epoch":
                    self._writer.add_scalar(key, value, epoch)
            self._writer.flush()
