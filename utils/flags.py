"""Settings as dataclasses: one field = one flag, one line of help, one check. No torch, so that --help answers at once."""
from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError
from utils.files import did_you_mean

Config = TypeVar("Config")
Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda v: v > 0, "must be above 0")
NOT_NEGATIVE: Check = (lambda v: v >= 0, "must be 0 or more")
UNIT: Check = (lambda v: 0 <= v <= 1, "must be between 0 and 1")

_TORCHRUN = "torchrun tells each process its rank: start it with torchrun --nproc_per_node 2 train.py …"
_NOTHING_IS_SENT = "leave it out: nothing is sent anywhere; results.csv and TensorBoard's files have the curves"
_ELSEWHERE = {  # flags of the YOLO family that are not here, and what takes their place
    "--evolve": "hyperparameters are not evolved here: copy data/hyps/hyp.scratch.yaml, change it, and compare with compare.py --hyp",
    "--adam": "use --optimizer Adam",
    "--linear-lr": "linear is the default; --cos-lr is the other one",
    "--notest": "use --noval",
    "--quad": "leave it out: images are not joined into larger ones here, but for the mosaic",
    "--local_rank": _TORCHRUN,
    "--local-rank": _TORCHRUN,
    **dict.fromkeys(("--entity", "--bucket", "--upload_dataset", "--bbox_interval", "--artifact_alias"), _NOTHING_IS_SENT),
    "--save-hybrid": "leave it out: labels never take part in what is scored",
    "--dnn": "leave it out: ONNX files run in ONNX Runtime",
    "--update": "leave it out: checkpoints are data, with nothing in them to strip",
    "--visualize": "feature maps are not drawn; compare.py --layers shows what each row costs",
    "--optimize": "leave it out: torchscript files are traced from the fused network",
    "--workspace": "leave it out: TensorRT takes the memory that it needs",
    "--keras": "leave it out: --include tflite writes TFLite files without TensorFlow",
    "--inplace": "leave it out: graphs written here change nothing in place",
    "--agnostic-nms": "boxes are suppressed within their class here; detect.py --agnostic-nms suppresses across classes",
    "--verbose": "leave it out: what a tool has to say is shown where it fails",
    "--train": "leave it out: exported networks are for inference",
    "--per-tensor": "leave it out: int8 weights have a scale for each channel, as quantize.py writes them",
    "--topk-per-class": "--max-det says how many boxes are left",
    "--topk-all": "--max-det says how many boxes are left",
}


def option(default: Any, text: str, *, check: Check | None = None, aliases: Sequence[str] = (), **argparse_args: Any) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": text, "check": check, "aliases": aliases, "argparse": argparse_args})


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, with the nearest flags."""

    def error(self, message: str) -> NoReturn:
        name, _, words = message.partition(": ")
        if name == "unrecognized arguments":
            flag = words.split()[0].partition("=")[0]
            if not flag.startswith("-"):
                raise UserError(f"{flag}: belongs to no flag: each takes one value, unless --help shows several (patterns, and names with spaces, "
                                "go in quotes)")
            if flag in _ELSEWHERE:
                raise UserError(f"{flag}: {_ELSEWHERE[flag]}")
            message = f"unknown argument {flag}{did_you_mean(flag, self._option_string_actions)}"
        raise UserError(f"{message} (--help lists all flags)")


def parse(cls: type[Config], argv: Sequence[str] | None, description: str) -> Config:
    """Command line -> checked settings.

    Raises:
        UserError: an unknown flag, or a value of another type or out of its range. SystemExit(0): --help.
    """
    return cls(**parse_given(cls, argv, description))


def parse_given(cls: type[Config], argv: Sequence[str] | None, description: str) -> dict[str, Any]:
    """Only the settings that the command line names, checked; raises as `parse`."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(cls):
        flags = [f"--{f.name.replace('_', '-')}", *f.metadata["aliases"]]
        arguments = {"dest": f.name, "help": f.metadata["help"]} | f.metadata["argparse"]
        if f.default is False:
            arguments["action"] = "store_true"
        else:
            arguments.setdefault("type", type(f.default))
            shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            arguments["help"] += f" (default: {shown})" if shown not in ("", None) else ""
        parser.add_argument(*flags, **arguments)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(parser.parse_args(argv)).items()}
    for f in dataclasses.fields(cls):
        if f.name in values:
            check_value(f, values[f.name], f"--{f.name.replace('_', '-')}")
    return values


def check_stored(cls: type, settings: Mapping[str, Any], place: str) -> None:
    """Settings that were read from a file are what its command line could have said.

    Raises:
        UserError: one is of another type or out of its range; the line begins with `place`.
    """
    for f in dataclasses.fields(cls):
        if f.name not in settings:
            continue
        value, flag = settings[f.name], f"{place}: its --{f.name.replace('_', '-')}"
        kind = int if f.default is None else type(f.default)
        choices, of_each = f.metadata["argparse"].get("choices"), f.metadata["argparse"].get("type")
        fits = type(value) in ((int, float) if kind is float else (kind,)) and (kind is not tuple or all(type(item) is of_each for item in value))
        if (value is None and f.default is None) or (fits and value == f.default):
            continue
        if not fits or value == () or (choices and value not in choices):
            raise UserError(f"{flag} {value!r}: is nothing that the flag takes: is the file damaged?")
        check_value(f, value, flag)


def check_value(f: dataclasses.Field, value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place} {value}: must be a finite number")
    check = f.metadata.get("check")
    if check and not check[0](value):
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise UserError(f"{place} {shown}: {check[1]}")
