"""A comparison from its networks to its report; each network that fails costs its own row only."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from utils.compare.entrants import Entrant, check_settings
from utils.compare.report import write_report
from utils.compare.rows import Profile, Row
from utils.compare.runs import Run, plan_runs, runs_of_before, train
from utils.compare.scores import Score, scored
from utils.config import CompareConfig
from utils.data.cache import fingerprint_files
from utils.data.labels import Split
from utils.data.open import open_splits, val_loader
from utils.data.spec import load_data_spec
from utils.device import compute_dtype, machine, precision_name, select_device
from utils.errors import UserError, first_line
from utils.evaluate.validate import ValResult, check_classes, validate
from utils.files import ROOT, find_file
from utils.hyp import load_hyp
from utils.log import info, warn
from utils.measure.runtimes import choose_runtimes
from utils.plots.training import read_results

_VAL_BATCH = 32


class Networks(Protocol):
    """What a comparison must be able to do with networks (models/profile.py does it)."""

    def build(self, cfg: str, names: Sequence[str]) -> Any: ...

    def load(self, weights: Path) -> Any: ...

    def count(self, model: Any, imgsz: int) -> Profile: ...

    def draw_rows(self, model: Any, imgsz: int, device: torch.device, dtype: torch.dtype, out: Path | None) -> str: ...

    def measure_latencies(self, models: Mapping[str, Any], profiles: Mapping[str, Profile], imgsz: int, runtimes: Sequence[Any],
                          batches: Sequence[int], device: torch.device) -> Iterator[list[str]]: ...


class Comparison:
    """`run()` does what is not done yet, and writes the report after each training, so that an interrupted one has a report too."""

    def __init__(self, config: CompareConfig, entrants: Sequence[Entrant], networks: Networks) -> None:
        """
        Args:
            config: with its image size.
        """
        config = dataclasses.replace(config, batches=tuple(sorted(set(config.batches))))
        self.config, self.networks = config, networks
        self.folder = Path(config.project).expanduser() / config.name
        self.rows = {entrant.name: Row(entrant) for entrant in entrants}
        self.device = select_device(config.device)
        self.dtype = compute_dtype(config.precision, self.device)
        self.runtimes, self.remarks = choose_runtimes(config.runtimes, self.device)
        self.missing = self.remarks.copy() if config.runtimes else []  # of what was asked for
        self.hyp = load_hyp(config.hyp)
        self.splits = self._open_splits() if config.data else {}
        self.data_key = {name: [split.fingerprint, fingerprint_files(split.images, named=False)] for name, split in self.splits.items()}
        self.models = {}
        self.planned = plan_runs(entrants, config.seeds, self.folder) if config.data else []
        self.before = self._finished_before(entrants) if self.planned else []
        for run in self.before:
            self.rows.setdefault(run.entrant.name, Row(run.entrant))

    def _finished_before(self, entrants: Sequence[Entrant]) -> list[Run]:
        """So that a network added later stands beside those that were there, whether they are named again or not."""
        finished = []
        for run in runs_of_before(self.folder, entrants, self.planned):
            try:
                if run.is_finished(None, self.hyp):
                    finished.append(run)
            except UserError as error:
                self.remarks.append(f"left out: {error}")
        return finished

    def _open_splits(self) -> dict[str, Split]:
        """Val, test where there is one, and a look at train."""
        trained = ("train",) if self.config.cfg else ()
        *train, val = open_splits(self.config, (*trained, "val"))
        check_settings(self.folder, self.config, val.fingerprint, train[0].fingerprint if train else "")
        splits = {"val": val}
        if "test" in load_data_spec(self.config.data, self.config.data_root or None).splits:
            try:
                (test,) = open_splits(self.config, ("test",))
            except UserError as error:
                self.remarks.append(f"no scores on the test split: {error}")
            else:
                if test.report.boxes:
                    splits["test"] = test
                else:
                    self.remarks.append("no scores on the test split: it has no labels")
        return splits

    @property
    def failed(self) -> bool:
        return bool(self.missing or self._problems())

    def _problems(self) -> list[str]:
        return [problem for row in self.rows.values() for problem in row.problems]

    def run(self) -> None:
        self.open()
        if self.config.data:
            self.score_checkpoints()
            self.train_all()
        self.measure()  # last: loader workers must not be forked from a process in which other runtimes have started their threads
        self.report()
        if self.config.layers:
            told = self._problems()
            self.measure_rows()
            if self._problems() != told:
                self.report(pictures=False)

    def open(self) -> None:
        """Build or load every network and count it."""
        for name, row in self.rows.items():
            with _Blame(row):
                names = self.splits["val"].names if self.splits else ()
                model = self.networks.load(_weights(row)) if row.entrant.weights else self.networks.build(row.entrant.cfg, names)
                size = model.whole_strides(self.config.imgsz)
                row.profile = self.networks.count(model, size)
                if size != self.config.imgsz:
                    self.remarks.append(f"{name}: at {size} px, the next whole number of its largest stride")
                self.models[name] = model

    def score_checkpoints(self) -> None:
        for name, row in self.rows.items():
            if name in self.models and row.entrant.weights and not any(run.entrant is row.entrant for run in self.before):
                with _Blame(row):
                    row.scores[0] = self._scored(_weights(row), self.folder / "scores" / f"{name}.json")

    def train_all(self) -> None:
        """Take what is trained to its end, train the rest, and score each as it ends."""
        left = []
        for run in sorted((run for run in (*self.planned, *self.before) if run.entrant.name in self.models), key=lambda run: run.seed):
            with _Blame(self.rows[run.entrant.name], f"seed {run.seed}: "):
                if run.is_finished(self.models[run.entrant.name].spec.to_dict(), self.hyp):
                    self._take(run)
                else:
                    left.append(run)
        for n, run in enumerate(left):
            with _Blame(self.rows[run.entrant.name], f"seed {run.seed}: "):
                torch.cuda.empty_cache()  # what PyTorch keeps for itself here, the training's own process needs
                info(f"\ntraining {n + 1} of {len(left)}: {run.entrant.name}, seed {run.seed} -> {run.folder}")
                train(run, self.config)
                self._take(run)
                self.report()

    def _take(self, run: Run) -> None:
        row = self.rows[run.entrant.name]
        row.scores[run.seed] = self._scored(run.best, run.folder / "scores.json")
        epochs = read_results(run.folder / "results.csv")
        row.learning[run.seed] = np.stack((epochs["epoch"] + 1, epochs["time_s"].cumsum() / 60, epochs["metrics/mAP_0.5:0.95"]), 1)

    def _scored(self, weights: Path, kept: Path) -> dict[str, Score]:
        return scored(weights, kept, self.splits, {"dtype": str(self.dtype), "data": self.data_key}, self._evaluate)

    def _evaluate(self, weights: Path) -> dict[str, ValResult]:
        model = self.networks.load(weights)
        network = model.fused().to(self.device, memory_format=torch.channels_last)
        imgsz, results = model.whole_strides(self.config.imgsz), {}
        for name, split in self.splits.items():
            check_classes(model.names, split.names, self.config.single_cls, str(weights))
            loader = val_loader(split, imgsz, _VAL_BATCH, model.pad_stride, self.config.workers, self.device)
            results[name] = validate(network, loader, split, self.device, self.dtype, single_cls=self.config.single_cls)
        return results

    def measure(self) -> None:
        """Latency of all networks side by side; the tables after each runtime but the last."""
        if not self.models:
            return
        profiles = {name: self.rows[name].profile for name in self.models}
        measured = self.networks.measure_latencies(self.models, profiles, self.config.imgsz, self.runtimes, self.config.batches, self.device)
        for n, remarks in enumerate(measured, 1):
            self.remarks += remarks
            if n < len(self.runtimes):
                self.report(pictures=False)
        for name, profile in profiles.items():
            self.rows[name].problems += profile.problems

    def measure_rows(self) -> None:
        """What each row of each network costs."""
        for name, model in self.models.items():
            with _Blame(self.rows[name]):
                out = None if self.config.noplots else self.folder / f"layers-{name}.png"
                info(f"\n{name}\n{self.networks.draw_rows(model, model.whole_strides(self.config.imgsz), self.device, self.dtype, out)}")

    def report(self, pictures: bool = True) -> None:
        """Tables and pictures of what is known by now."""
        config = self.config
        notes = [f"costs at {config.imgsz} px on {machine(self.device)}: parameters, GFLOPs and file as trained; "
                 "memory and latency with branches merged and batch norm folded"]
        for runtime in self.runtimes:
            profiles = [row.profile for row in self.rows.values() if row.profile]
            runs = [latency.runs for profile in profiles for (name, _), latency in profile.latency.items() if name == runtime.name]
            if runs:
                notes.append(f"latency: {runtime.describe()}, {min(runs)} runs of each or more")
        if config.data:
            length = f"{config.budget_minutes:g} minutes" if config.budget_minutes else f"{config.epochs} epochs"
            of_each = {tuple(sorted(row.learning)) for row in self.rows.values() if row.learning} or {tuple(config.seeds)}
            seeds = f"seeds {' '.join(map(str, sorted(set().union(*of_each))))}{', not all of each network' * (len(of_each) > 1)}"
            trained = f", {length}, batch {config.batch_size}, {seeds}"
            notes.append(f"{config.data}, {config.imgsz} px{trained if config.cfg else ''}, {precision_name(self.device, self.dtype)}; mAP is COCO's")
        # Another name without scores: these stay where they are when only costs are asked for.
        order = [(runtime.name, batch) for runtime in self.runtimes for batch in config.batches]
        write_report(self.folder, "compare" if config.data else "costs", list(self.rows.values()), self.splits, order, notes + self.remarks,
                     pictures=pictures and not config.noplots)


def _weights(row: Row) -> Path:
    return find_file(row.entrant.weights, [ROOT], "weights file")


class _Blame:
    """Puts what goes wrong in its block on a network's row, and goes on: a user's own block, another library or memory may fail in any way."""

    def __init__(self, row: Row, prefix: str = "") -> None:
        self.row, self.prefix = row, prefix

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self.row.problems.append(f"{self.prefix}{error if isinstance(error, UserError) else first_line(error)}")
            warn(f"{self.row.entrant.name}: {self.row.problems[-1]}; the others go on")
            return True
        return False
