"""The trainings of a comparison: one folder for each network and seed, each in a process of its own, interrupted and gone on with as they like."""
from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from utils.checkpoint import load_checkpoint
from utils.compare.entrants import Entrant
from utils.config import CompareConfig
from utils.errors import UserError
from utils.files import ROOT
from utils.hyp import Hyp
from utils.signals import Terminated

_ENDLESS = 100_000  # epochs, where time is the limit
_GRACE_S = 10.0  # for a training that was interrupted to end by itself
_ANEW = ("device", "workers", "data_root")  # what may differ from sitting to sitting
_PASSED_ON = ("data", "imgsz", "batch_size", "hyp", "precision", "plugin", *_ANEW)


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

    def is_finished(self, spec: Mapping[str, Any] | None, hyp: Hyp) -> bool:
        """Trained to the end; a run that never wrote last.pt is not.

        Args:
            spec: the network that it must be of; None: its own.

        Raises:
            UserError: last.pt can't be read, or is of another network or of other hyperparameters.
        """
        if not self.last.exists():
            return False
        checkpoint = load_checkpoint(self.last)
        state = checkpoint.training or {}
        same = {"network": spec is None or _rows(checkpoint.spec) == _rows(spec), "hyperparameters": state.get("hyp") == asdict(hyp)}
        other = [what for what, is_same in same.items() if not is_same]
        if other:
            raise UserError(f"{self.folder}: was trained with other {' and '.join(other)} of the same name: "
                            "remove that folder, or give another --name")
        return bool(state.get("finished")) and self.best.exists()


def plan_runs(entrants: list[Entrant], seeds: tuple[int, ...], folder: Path) -> list[Run]:
    """Every network with the first seed, then with the next: an interrupted comparison has compared something."""
    new = [entrant for entrant in entrants if entrant.cfg]
    return [Run(entrant, seed, folder / "runs" / f"{entrant.name}-seed{seed}") for seed in dict.fromkeys(seeds) for entrant in new]


def runs_of_before(folder: Path, entrants: Sequence[Entrant], planned: Sequence[Run]) -> list[Run]:
    """What earlier sittings trained in this folder and the present one does not ask for: other networks, by their checkpoints, and other seeds.

    A checkpoint that is compared now and has the name of such a network stands for itself alone.
    """
    known, found = {entrant.name: entrant for entrant in entrants}, []
    given = {entrant.name for entrant in entrants if entrant.weights}
    for last in sorted((folder / "runs").glob("*-seed*/weights/last.pt")):
        name, _, seed = last.parents[1].name.rpartition("-seed")
        if seed.isdecimal() and name not in given and not any(run.last == last for run in planned):
            entrant = known.setdefault(name, Entrant(name, weights=str(last.with_name("best.pt"))))
            found.append(Run(entrant, int(seed), last.parents[1]))
    return found


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
    except BaseException as error:
        if isinstance(error, Terminated):
            process.terminate()
        try:
            process.wait(_GRACE_S)  # it has heard of it too: let it end its way
        except subprocess.TimeoutExpired:
            process.kill()  # a signal for this process alone did not; its last epoch is on the disk
            process.wait()
        raise
    if process.wait():
        lines = tail.decode(errors="replace").replace("\r", "\n").strip().splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        code = process.returncode
        ended = f"killed by signal {-code}{' (out of memory?)' if code == -signal.SIGKILL else ''}" if code < 0 else f"ended with exit code {code}"
        raise UserError(said[-1] if said else f"the training was {ended}" if code < 0 else f"the training {ended}: {' '.join(lines[-1:])}")


def command(run: Run, config: CompareConfig) -> list[str]:
    """train.py's arguments."""
    if run.last.exists():
        return ["--resume", str(run.last), *_flags(config, (*_ANEW, "plugin"))]
    words = ["--cfg", run.entrant.cfg, "--seed", str(run.seed), "--project", str(run.folder.parent), "--name", run.folder.name, "--exist-ok"]
    words += ["--epochs", str(_ENDLESS if config.budget_minutes else config.epochs), "--time-limit", str(config.budget_minutes), "--patience", "0"]
    return words + _flags(config, _PASSED_ON) + ["--single-cls"] * config.single_cls + ["--noplots"] * config.noplots


def _flags(config: CompareConfig, names: Sequence[str]) -> list[str]:
    return [word for name in names if (value := getattr(config, name)) != "" for word in (f"--{name.replace('_', '-')}", str(value))]


def _rows(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What makes it this network; anchors are fitted to the data when a training begins, but not how many there are."""
    rows = {key: spec.get(key) for key in ("nc", "depth_multiple", "width_multiple", "activation", "backbone", "head", "widths")}
    anchors = spec.get("anchors")
    return rows | {"anchors a level": anchors if isinstance(anchors, int) else len(anchors[0]) // 2 if anchors else None}
