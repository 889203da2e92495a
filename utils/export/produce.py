"""One exported file, from the network to its place: written beside it, checked, and only then moved there."""
from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from utils.device import full_float32
from utils.errors import UserError, foreign_errors
from utils.export.backends import open_network
from utils.export.check import CONFIDENCE, TOLERANCES, Agreement, Tolerance, check_batches, compare
from utils.export.check_final import compare_final, surest
from utils.export.formats import FORMATS, ExportJob, Format
from utils.files import atomic_folder, atomic_write, size_bytes
from utils.log import info
from utils.network import Network


def produce(job: ExportJob, kind: Format, stem: Path, images: Sequence[np.ndarray], reference: Network, device: torch.device) -> Path:
    """Write `job` in a format as `stem` and the format's suffix, whole and checked or not at all; one line tells how the check went.

    Args:
        images: (H, W, 3) uint8 BGR, to check it with.
        reference: the network that the file must agree with, on `device`.

    Raises:
        UserError: a package is missing, the network can't be converted, or the file finds other boxes or can't be run here: it is then kept
            under another name.
    """
    if missing := kind.missing(job):
        raise UserError(f"{kind.name}: {missing}")
    path, aside, unchecked = (stem.with_name(f"{stem.name}{mark}{kind.suffix}") for mark in ("", ".mismatch", ".unchecked"))
    start = time.perf_counter()
    if job.metadata.nms and not kind.suppresses:
        raise UserError(f"{kind.name}: --nms goes into {' and '.join(f.name for f in FORMATS.values() if f.suppresses)} only: leave it out")
    with (atomic_folder if kind.is_folder else atomic_write)(path) as temporary, _named_errors(job, kind, temporary):
        _write(job, kind, temporary, device)
        if kind.elsewhere:
            _keep_aside(temporary, unchecked)
            raise UserError(f"written as {unchecked}, unchecked: {kind.elsewhere}")
        try:
            agreement = _check(job, temporary, images, reference, device, TOLERANCES[job.metadata.precision])
            if job.metadata.nms and not agreement.boxes:
                agreement = _check_below(job, kind, images, reference, device)
            if not agreement.holds:
                raise UserError(f"does not find what the checkpoint finds: {agreement}")
        except UserError as error:
            _keep_aside(temporary, aside)
            raise UserError(f"{error}; kept aside as {aside}") from error
    info(f"{kind.name}: {path}: {size_bytes(path) / 2**20:.1f} MiB, in {time.perf_counter() - start:.1f} s; {agreement}")
    return path


@contextmanager
def _named_errors(job: ExportJob, kind: Format, path: Path) -> Iterator[None]:
    """The format before what is wrong, and not the name that its file has meanwhile."""
    try:
        with _unnamed(path):
            yield
    except UserError as reason:
        hint = "; without --dynamic it may go" if job.metadata.dynamic and not str(reason).startswith("--") else ""
        raise UserError(f"{kind.name}: {reason}{hint}") from reason


@contextmanager
def _unnamed(path: Path) -> Iterator[None]:
    """Leave a name out of what is wrong that is soon gone."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(rf"{re.escape(str(path))}\S*: ", "", str(error))) from error


def _write(job: ExportJob, kind: Format, path: Path, device: torch.device) -> None:
    with foreign_errors("this network can't be converted"), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kind.write(job, path)


def _check(
    job: ExportJob, path: Path, images: Sequence[np.ndarray], reference: Network, device: torch.device, tolerance: Tolerance
) -> Agreement:
    exported = open_network(path, device=str(device) if device.type == "cuda" else "")
    batches = check_batches(images, job.metadata.imgsz, exported.pad_stride)
    with full_float32():
        if job.metadata.nms:
            return compare_final(reference, exported, job.metadata.nms, batches, tolerance, device)
        return compare(reference, exported, batches, tolerance, device)


def _check_below(job: ExportJob, kind: Format, images: Sequence[np.ndarray], reference: Network, device: torch.device) -> Agreement:
    """Neither has a box above the file's threshold on these images: the same graph with a lower one shows what its suppression does."""
    lower = min(CONFIDENCE, surest(reference, check_batches(images, job.metadata.imgsz, None), device) / 2)
    metadata = dataclasses.replace(job.metadata, nms=dataclasses.replace(job.metadata.nms, conf_thres=lower))
    usual = TOLERANCES[job.metadata.precision]
    smaller = usual._replace(conf=usual.conf * lower / CONFIDENCE)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"lower{kind.suffix}"
        if kind.is_folder:
            path.mkdir()
        lowered = dataclasses.replace(job, metadata=metadata)
        with _unnamed(path):
            _write(lowered, kind, path, device)
            agreement = _check(lowered, path, images, reference, device, smaller)
    return dataclasses.replace(agreement, what=f"neither has a box above {job.metadata.nms.conf_thres:g}; with a lower threshold final boxes")


def _keep_aside(path: Path, aside: Path) -> None:
    if aside.is_dir():
        shutil.rmtree(aside)
    os.replace(path, aside)
