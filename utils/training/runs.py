"""A run: its settings and its folder, new or taken up where it stopped."""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from utils.config import TrainConfig
from utils.data.spec import find_data_yaml
from utils.errors import UserError
from utils.files import has_writer, new_run_dir, only_writer, write_yaml
from utils.flags import check_stored
from utils.hyp import Hyp, hyp_from_dict, load_hyp
from utils.log import info
from utils.training.qat import fine_tuning
from utils.training.state import TrainState

_AFTER_PRUNING = "hyp.finetune.yaml"
_MAY_CHANGE = {"epochs", "device", "workers", "time_limit", "patience", "cache", "noplots", "save_period", "data_root", "project",
               "precision", "plugin", "download"}


PREPARED = ("opt.yaml", "hyp.yaml")  # what `run_folder` puts into a run's folder


@dataclass(frozen=True)
class Run:
    """A training's settings, its folder once it has one, and what it goes on from."""

    config: TrainConfig
    hyp: Hyp
    folder: Path | None = None
    checkpoint: Checkpoint | None = None  # the last.pt to go on with
    state: TrainState | None = None


def new_run(given: dict[str, Any]) -> Run:
    """A run of these settings, its files named so that --resume finds them from any folder.

    Raises:
        UserError: a file is not there, or a teacher's settings are given without one, or leave nothing to learn from it; or what --qat can't do.
    """
    given = fine_tuning(given) if given.get("qat") else _after_pruning(given)
    config = TrainConfig(**given)
    _check_partners(config, given)
    if config.rect and config.image_weights:
        raise UserError("--rect keeps its batches together, and --image-weights draws images one by one: leave one of them out")
    paths: dict[str, Any] = {"data": str(find_data_yaml(config.data))}
    paths["teacher"] = _find_teachers(config)
    paths |= {name: os.path.abspath(value) for name in ("data_root", "plugin") if (value := getattr(config, name))}
    return Run(dataclasses.replace(config, **paths), load_hyp(config.hyp))


def _after_pruning(given: dict[str, Any]) -> dict[str, Any]:
    """The command line, and where it says nothing what suits what prune.py left of a trained network."""
    if not given.get("weights") or given.get("cfg") or {"hyp", "imgsz"} <= given.keys():
        return given
    checkpoint = load_checkpoint(given["weights"])
    if not checkpoint.spec.get("widths"):
        return given
    suited = {"hyp": _AFTER_PRUNING, "imgsz": checkpoint.imgsz or TrainConfig.imgsz}
    if chosen := [f"--{name} {value}" for name, value in suited.items() if name not in given]:
        info(f"{given['weights']}: pruned, so trained on with {' '.join(chosen)}")
    return suited | given


def _check_partners(config: TrainConfig, given: dict[str, Any]) -> None:
    """Refuse what says nothing without another flag."""
    for name in ("distill", "distill_features", "teacher_imgsz"):
        if name in given and not config.teacher:
            raise UserError(f"--{name.replace('_', '-')}: needs a teacher: name a trained network, --teacher runs/train/exp/weights/best.pt")
    if "soft_ratio" in given and not config.soft_prune:
        raise UserError("--soft-ratio: is the share of --soft-prune: give that too, sfp or fpgm")
    if config.teacher and not config.distill and not config.distill_features:
        raise UserError("--distill 0: leaves nothing to learn from --teacher: give --distill-features a gain above 0, or leave out --teacher")


def _find_teachers(config: TrainConfig) -> tuple[str, ...]:
    """Absolute; raises the one line on a file that is not, or no longer, there."""
    return tuple(os.path.abspath(find_checkpoint(path)) for path in config.teacher)


def _newest_last(project: str) -> Path:
    """The newest last.pt below a folder of runs where nobody trains now."""
    every = [*Path(project).expanduser().glob("**/weights/last.pt")]
    found = sorted((last for last in every if not has_writer(last.parent.parent)), key=lambda p: p.stat().st_mtime)
    if not found:
        others = ", but where another process trains now" if every else ""
        raise UserError(f"--resume: no weights/last.pt below {project}{others}; name one: --resume runs/train/exp/weights/last.pt")
    return found[-1]


def resumed_run(given: dict[str, Any]) -> Run:
    """The run that `--resume` names, with its own settings and those few that may change.

    Raises:
        UserError: no such run, it is finished, or a setting is given that would make it another run.
    """
    given = dict(given)
    asked = given.pop("resume")
    last = _newest_last(given.get("project", TrainConfig.project)) if asked == "newest" else find_checkpoint(asked)
    for name in given:
        if name not in _MAY_CHANGE:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"--resume goes on with the run's own settings: leave out {flag}, or start anew with --weights {last}")
    checkpoint = load_checkpoint(last)
    state = TrainState.from_dict(checkpoint.training, str(last))
    if not isinstance(state.config, dict):
        raise UserError(f"{last}: its settings are of another version: start anew with --weights {last}")
    # A checkpoint may come from anywhere: neither a program that it names is run, nor an address opened, unless the command line says so.
    check_stored(TrainConfig, state.config, str(last))
    if state.config.get("plugin") and "plugin" not in given:
        raise UserError(f"{last}: its run used --plugin {state.config['plugin']}, a program: name it again, if you trust it")
    if "plugin" in given:
        given["plugin"] = os.path.abspath(given["plugin"])
    try:
        config = TrainConfig(**state.config | {"download": False} | given | {"resume": str(last)})
    except TypeError as error:
        raise UserError(f"{last}: its settings are of another version: {error}: start anew with --weights {last}") from None
    if state.finished and state.epoch >= config.epochs:
        raise UserError(f"{last}: finished after {state.epoch} epochs: give --epochs {state.epoch * 2} to go on, or --weights {last} to start anew")
    if state.epoch >= config.epochs:
        raise UserError(f"{last}: --epochs {config.epochs}: {state.epoch} are done: give more to go on")
    if state.finished and not given.keys() & {"epochs", "time_limit", "patience"}:
        raise UserError(f"{last}: its --time-limit or --patience ended it after epoch {state.epoch} of {config.epochs}: give another of these to "
                        f"go on, or --weights {last} to start anew")
    folder = last.resolve().parent
    if folder.name != "weights":
        raise UserError(f"{last}: --resume goes on in the run's folder, and this file has left its weights/: move it back, or start anew with "
                        f"--weights {last}")
    _find_teachers(config)
    state.finished = False
    info(f"going on with {last} after epoch {state.epoch} of {config.epochs}")
    return Run(config, hyp_from_dict(state.hyp, str(last)), folder.parent, checkpoint, state)


@contextmanager
def run_folder(run: Run, config: TrainConfig) -> Iterator[Path]:
    """The run's folder, of this process alone, with opt.yaml (`config` as it turned out) and hyp.yaml in it.

    Raises:
        UserError: another process writes there.
    """
    folder = run.folder or new_run_dir(config.project, config.name, config.exist_ok)
    with only_writer(folder):
        opt, hyp = PREPARED
        write_yaml(folder / opt, {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()})
        write_yaml(folder / hyp, dataclasses.asdict(run.hyp))
        yield folder
