"""What a comparison knows of each network, and its figures as a table's cells."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from utils.compare.entrants import Entrant
from utils.compare.scores import Score
from utils.measure.timing import Latency


@dataclass
class Profile:
    """What a network costs; `latency` by runtime and batch size, where it ran."""

    parameters: int
    gflops: float
    file_mb: float  # of a checkpoint for inference
    memory_mb: float  # weights, and the most that one image's activations take
    latency: dict[tuple[str, int], Latency] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # where it did not run, and why

    def p50(self, runtime: str, batch: int = 1) -> float | None:
        value = self.latency.get((runtime, batch))
        return value.p50_ms if value else None


@dataclass
class Row:
    """One network of the comparison."""

    entrant: Entrant
    profile: Profile | None = None
    scores: dict[int, dict[str, Score]] = field(default_factory=dict)  # seed -> split -> score
    learning: dict[int, np.ndarray] = field(default_factory=dict)  # seed -> (epochs, 3) epochs and minutes so far, val mAP50-95
    problems: list[str] = field(default_factory=list)

    @property
    def minutes(self) -> tuple[float, ...]:
        """Of each seed's training."""
        return tuple(float(epochs[-1, 1]) for epochs in self.learning.values())

    def metric(self, split: str, name: str) -> tuple[float, ...]:
        """One value for each seed that is scored."""
        return tuple(of[split].metrics[name] for of in self.scores.values() if split in of)

    def class_ap(self, split: str) -> np.ndarray:
        """(C,) mean over seeds; nan of a class that the split has none of."""
        return np.array([of[split].class_ap for of in self.scores.values() if split in of], float).mean(0)  # None becomes nan


class Column(NamedTuple):
    """A figure of the table: its name, unit and digits, and its values (one for each seed, or one, or none)."""

    title: str
    digits: int
    values: list[tuple[float, ...]]  # for each row
    detail: bool = False  # left out where there is little room


def columns_of(rows: Sequence[Row], splits: Sequence[str], latencies: Sequence[tuple[str, int]]) -> list[Column]:
    """All columns that have a figure in some row."""

    def cost(read: str, scale: float = 1.0) -> list[tuple[float, ...]]:
        return [(getattr(row.profile, read) / scale,) if row.profile else () for row in rows]

    def latency(key: tuple[str, int], part: str) -> list[tuple[float, ...]]:
        found = [row.profile.latency.get(key) if row.profile else None for row in rows]
        return [(getattr(value, f"{part}_ms"),) if value else () for value in found]

    columns = [Column("params (M)", 2, cost("parameters", 1e6)), Column("GFLOPs", 1, cost("gflops")), Column("file (MB)", 1, cost("file_mb")),
               Column("memory (MB)", 0, cost("memory_mb"))]
    columns += [Column(f"{runtime} b{batch} {part} (ms)", 1, latency((runtime, batch), part), part == "p90")
                for runtime, batch in latencies for part in ("p50", "p90")]
    columns += [Column(f"{split} {name}", 3, [row.metric(split, name) for row in rows]) for split in splits for name in ("mAP50", "mAP50-95")]
    columns += [Column("training (min)", 1, [row.minutes for row in rows])]
    return [column for column in columns if any(column.values)]


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The sample's standard deviation; None of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; nan of fewer than two pairs or where all are equal."""
    if len(a) < 2:
        return float("nan")
    ranks = np.array([_ranks(np.asarray(a)), _ranks(np.asarray(b))])
    spread = ranks.std(1)
    return float(np.corrcoef(ranks)[0, 1]) if spread.all() else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
