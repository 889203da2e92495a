"""Who takes part in a comparison, and under which settings: the same for all, and for every later sitting."""
from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from utils.checkpoint import load_checkpoint
from utils.config import DEFAULT_IMGSZ, CompareConfig
from utils.data.spec import find_data_yaml
from utils.errors import UserError
from utils.files import MODEL_FOLDERS, ROOT, find_file, read_yaml, write_yaml

# What the scores depend on, besides data and hyp; of networks that are trained here on more.
_DECISIVE, _OF_TRAINING = ("imgsz", "single_cls", "precision"), ("epochs", "budget_minutes", "batch_size")


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
    files = _once(file for cfg in cfgs for file in _expand(cfg))
    checkpoints = _once(file for pattern in weights for file in _expand(pattern))
    entrants = [Entrant(Path(file).stem, cfg=file) for file in files] + [Entrant(_name_of(Path(file)), weights=file) for file in checkpoints]
    if not entrants:
        raise UserError("name the networks: --cfg yolov5s.yaml yolov5s-ghost.yaml, or trained ones: --weights runs/train/exp/weights/best.pt")
    for name, count in Counter(e.name for e in entrants).items():
        if count > 1:
            both = " and ".join(e.cfg or e.weights for e in entrants if e.name == name)
            raise UserError(f"{both}: {count} networks named {name}: rename a file (a run's folder) so that the table can tell them apart")
    return entrants


def _once(files: Iterable[str]) -> list[str]:
    """Each file once, however it is written; a bare name may be one of the project's."""
    return list({_real(file): file for file in reversed(list(files))}.values())[::-1]


def _real(file: str) -> str:
    try:
        return os.path.realpath(find_file(file, MODEL_FOLDERS, "file"))
    except UserError:
        return file  # it will cost its own row


def _expand(pattern: str) -> list[str]:
    if not glob.has_magic(pattern) or os.path.isfile(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern)) or sorted(glob.glob(str(ROOT / pattern)))
    if not found:
        raise UserError(f"{pattern}: no file fits it, neither here nor in {ROOT}")
    return found


def _name_of(weights: Path) -> str:
    """A run's name for its weights/best.pt, else the file's."""
    if weights.stem not in ("best", "last"):
        return weights.stem
    folder = weights.absolute().parent
    return folder.parent.name if folder.name == "weights" else folder.name


def image_size(config: CompareConfig, entrants: Sequence[Entrant]) -> int:
    """As asked for, else the size that the checkpoints were trained at, else the default.

    Raises:
        UserError: checkpoints of several sizes.
    """
    if config.imgsz:
        return config.imgsz
    sizes = {}
    for weights in (entrant.weights for entrant in entrants if entrant.weights):
        with suppress(UserError):  # it will cost the row of the checkpoint
            sizes[load_checkpoint(weights).imgsz] = weights
    sizes.pop(None, None)
    if len(sizes) > 1:
        trained = " and ".join(f"{weights} at {size}" for size, weights in sizes.items())
        raise UserError(f"trained at several sizes, {trained} pixels: give one --imgsz for all")
    return next(iter(sizes), DEFAULT_IMGSZ)


def _flag(name: str, value: object) -> str:
    flag = f"--{name.replace('_', '-')}"
    return f"{flag} {value}" if not isinstance(value, bool) else flag if value else f"no {flag}"


def check_settings(folder: Path, config: CompareConfig, fingerprint: str, of_training: str) -> None:
    """Note what the scores depend on in a new comparison's folder; in an old one it must be the same.

    Args:
        fingerprint: of the val split.
        of_training: of the train split; empty where nothing is trained.

    Raises:
        UserError: the folder holds a comparison with other settings; they are named.
    """
    settings = {name: getattr(config, name) for name in (*_DECISIVE, *(_OF_TRAINING if of_training else ()))}
    settings |= {"data": find_data_yaml(config.data).name, "fingerprint": fingerprint} | ({"train_fingerprint": of_training} if of_training else {})
    path = folder / "settings.yaml"
    old = read_yaml(path) if path.exists() else {}
    if differing := [name for name in settings if name in old and old[name] != settings[name]]:
        flags = " ".join(_flag(name, old[name]) for name in differing if not name.endswith("fingerprint"))
        raise UserError(f"{folder}: holds a comparison {f'with {flags}' if flags else 'on other images or labels'}: "
                        f"{'repeat these to go on with it, or ' if flags else ''}give another --name")
    if settings.keys() - old.keys():
        write_yaml(path, settings | old)
