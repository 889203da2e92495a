"""What a training must remember to go on exactly where it stopped."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError


@dataclass
class TrainState:
    """Plain data and tensors: the `training` part of last.pt."""

    config: dict[str, Any]
    hyp: dict[str, Any]
    epoch: int = 0  # epochs done
    step: int = 0  # batches done, since the first epoch
    seconds: float = 0.0  # of training and validation so far, all sittings together
    best_fitness: float = -1.0
    best_epoch: int = 0
    ema_updates: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # a row of results.csv for each epoch
    gammas: list[list[int]] = field(default_factory=list)  # with --slim: a histogram of batch-norm scales for each epoch
    class_ap: list[float] = field(default_factory=list)  # of the last validation, for --image-weights
    model: dict[str, Tensor] = field(default_factory=dict)  # raw weights; the checkpoint's own are the averaged ones
    adapters: dict[str, Tensor] = field(default_factory=dict)  # of a feature distillation
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What grows with the epochs is packed: a checkpoint holds only so many values."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        return content | {"gammas": torch.tensor(self.gammas), "history": pack_rows(self.history)}

    @classmethod
    def from_dict(cls, content: dict[str, Any] | None, origin: str) -> TrainState:
        if content is None:
            raise UserError(f"{origin}: holds no training state (a best.pt, or a file of YOLOv5?): --resume needs a run's last.pt; "
                            f"--weights {origin} starts from it")
        try:
            state = cls(**content)
            state.gammas = torch.as_tensor(state.gammas).tolist()
            state.history = unpack_rows(state.history)
            return state
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"{origin}: its training state is of another version: {error}: start anew with --weights {origin}") from None


def pack_rows(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Rows of numbers as their columns' names and one tensor; what a row lacks is nan."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    values = torch.tensor([[row.get(key, math.nan) for key in columns] for row in rows], dtype=torch.float64)
    return {"columns": columns, "values": values}


def unpack_rows(packed: Mapping[str, Any] | list[dict[str, float]]) -> list[dict[str, float]]:
    """As they were before `pack_rows`; older files hold them so."""
    if isinstance(packed, list):
        return packed
    rows = [dict(zip(packed["columns"], values, strict=True)) for values in packed["values"].tolist()]
    return [{key: int(value) if key == "epoch" else value for key, value in row.items() if not math.isnan(value)} for row in rows]
