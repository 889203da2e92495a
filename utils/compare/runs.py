"""The trainings of a comparison: one folder for each network and seed, each in a process of its own, interrupted and gone on with as they like."""
from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from utils.checkpoint import load_checkpoint
from utils.compare.entrants import Entrant
from utils.config import CompareConfig
from utils.errors import UserError
from utils.files import ROOT

_ENDLESS = 100_000  # epochs, where time is the limit
_PASSED_ON = ("data", "imgsz", "batch_size", "hyp", "workers", "precision", "device", "plugin", "data_root")


class Run(NamedTuple):
    """One training of one network."""

    entrant: Entrant
    seed: int
    folder: Path

    @property
    def last(self) -> Path:
        return self.folder / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        return self.folder / "weights" / "best.pt"

    def is_finished(self) -> bool:
        """Trained to the end; a run that never wrote last.pt is not.

        Raises:
            UserError: last.pt can't be read.
        """
        if not (self.last.exists() and self.best.exists()):
            return False
        return bool((load_checkpoint(self.last).training or {}).get("finished"))

    def history(self) -> list[dict[str, float]]:
        """The rows of results.csv: numbers by column."""
        try:
            with open(self.folder / "results.csv", newline="", encoding="utf-8") as file:
                return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / 'results.csv'}: can't be read as results of a training: {error}") from None


def plan_runs(entrants: list[Entrant], seeds: tuple[int, ...], folder: Path) -> list[Run]:
    """Every network with the first seed, then with the next: an interrupted comparison has compared something."""
    return [Run(entrant, seed, folder / "runs" / f"{entrant.name}-seed{seed}") for seed in seeds for entrant in entrants if entrant.cfg]


def train(run: Run, config: CompareConfig) -> None:
    """Train a run to its end, or go on with it.

    Raises:
        UserError: the training failed; its last line.
    """
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command(run, config)], stderr=subprocess.PIPE)
    tail = b""
    try:
        while chunk := process.stderr.read1(4096):
            sys.stderr.buffer.write(chunk)  # the progress bar passes through
            sys.stderr.buffer.flush()
            tail = (tail + chunk)[-4000:]
    except KeyboardInterrupt:  # it got the same signal; let it end its way
        process.wait()
        raise
    if process.wait():
        lines = tail.decode(errors="replace").replace("\r", "\n").strip().splitlines()
        raise UserError(lines[-1].removeprefix("error: ") if lines else f"the training ended with exit code {process.returncode}")


def command(run: Run, config: CompareConfig) -> list[str]:
    """train.py's arguments."""
    if run.last.exists():
        return ["--resume", str(run.last)]
    words = ["--cfg", run.entrant.cfg, "--seed", str(run.seed), "--project", str(run.folder.parent), "--name", run.folder.name, "--exist-ok"]
    words += ["--epochs", str(_ENDLESS if config.budget_minutes else config.epochs), "--time-limit", str(config.budget_minutes), "--patience", "0"]
    for name in _PASSED_ON:
        if (value := getattr(config, name)) != "":
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words + ["--single-cls"] * config.single_cls + ["--noplots"] * config.noplots
