"""Who takes part in a comparison, and under which settings: the same for all, and for every later sitting."""
from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.config import CompareConfig
from utils.errors import UserError
from utils.files import ROOT, read_yaml, write_yaml

_DECISIVE = ("data", "imgsz", "epochs", "budget_minutes", "batch_size", "hyp", "single_cls", "precision")  # what the scores depend on


class Entrant(NamedTuple):
    """One network: a YAML to train, or a checkpoint as it is."""

    name: str
    cfg: str = ""
    weights: str = ""


def find_entrants(cfgs: Sequence[str], weights: Sequence[str]) -> list[Entrant]:
    """The networks that the command line names; a pattern such as 'models/*.yaml' stands for its files, here or in the project.

    Raises:
        UserError: nothing is named, a pattern fits no file, or two networks have one name.
    """
    files = list(dict.fromkeys(file for cfg in cfgs for file in _expand(cfg)))
    checkpoints = list(dict.fromkeys(file for pattern in weights for file in _expand(pattern)))
    entrants = [Entrant(Path(file).stem, cfg=file) for file in files] + [Entrant(_name_of(Path(file)), weights=file) for file in checkpoints]
    if not entrants:
        raise UserError("name the networks: --cfg yolov5s.yaml yolov5s-ghost.yaml, or trained ones: --weights a/best.pt b/best.pt")
    for name, count in Counter(e.name for e in entrants).items():
        if count > 1:
            both = " and ".join(e.cfg or e.weights for e in entrants if e.name == name)
            raise UserError(f"{both}: {count} networks named {name}: rename a file (a run's folder) so that the table can tell them apart")
    return entrants


def _expand(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern)) or sorted(glob.glob(str(ROOT / pattern)))
    if not found:
        raise UserError(f"{pattern}: no file fits it, neither here nor in {ROOT}")
    return found


def _name_of(weights: Path) -> str:
    """A run's name for its weights/best.pt, else the file's."""
    run = weights.absolute().parents[1].name
    return run if weights.stem in ("best", "last") and weights.parent.name == "weights" else weights.stem


def open_folder(config: CompareConfig) -> Path:
    """The comparison's folder, new or gone on with.

    Raises:
        UserError: it holds a comparison with other settings; they are named.
    """
    folder = Path(config.project).expanduser() / config.name
    settings = {name: getattr(config, name) for name in _DECISIVE}
    path = folder / "settings.yaml"
    if path.exists():
        _check_same(read_yaml(path), settings, folder)
    elif config.data:
        write_yaml(path, settings)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    if not new["data"]:
        return  # only measured this time: nothing is trained or scored
    differing = [f"--{name.replace('_', '-')} {old.get(name)}" for name in _DECISIVE if old.get(name) != new[name]]
    if differing:
        raise UserError(f"{folder}: holds a comparison with {' '.join(differing)}: repeat these to go on with it, or give another --name")
