"""The one checkpoint format: tensors and plain data, so that a network travels without its code and opening a file runs nothing."""
from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.archive import MAX_DEPTH, MAX_NODES, Archive
from utils.errors import UserError
from utils.files import ROOT, atomic_write, find_file
from utils.legacy import read_legacy
from utils.unpickle import STORAGE_DTYPES

FORMAT = "light-yolo"
VERSION = 1
_LARGEST_IMGSZ = 8192  # pixels, as the command line takes
_DTYPES = set(STORAGE_DTYPES.values())


@dataclass
class Checkpoint:
    """A network with its weights, and in last.pt the state that training goes on from.

    Attributes:
        spec: the keys of a model YAML; rebuilds the network.
        names: class names, one a class.
        state_dict: weights to infer with (EMA where trained); in best.pt see `for_inference`.
        metrics: as measured when it was saved.
        imgsz: side in pixels that it was trained for, if known.
        int8: the weights were fine-tuned for int8 (train.py --qat), by this file's own training.
        training: what resuming needs, tensors and plain data; None in a file for inference.
    """

    spec: dict[str, Any]
    names: tuple[str, ...]
    state_dict: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)
    imgsz: int | None = None
    int8: bool = False
    training: dict[str, Any] | None = None


def cast_floats(state_dict: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`, counters as they are."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state_dict.items()}


def for_inference(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """In fp16, as files for inference are; in fp32 where a value is beyond it."""
    half = cast_floats(state_dict, torch.float16)
    fits = all(tensor.isfinite().all() for tensor in half.values() if tensor.is_floating_point())
    return half if fits else cast_floats(state_dict, torch.float32)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write the file whole or not at all. Tensors are written from the CPU, without the rest of a storage that they view.

    Raises:
        ValueError: something in it is neither a tensor nor plain data; the message names its place.
        OSError: the disk is full or the folder can't be written.
    """
    parts = {
        "spec": checkpoint.spec,
        "names": list(checkpoint.names),
        "state_dict": dict(checkpoint.state_dict),
        "metrics": {name: float(value) for name, value in checkpoint.metrics.items()},
        "imgsz": checkpoint.imgsz,
        "int8": checkpoint.int8,
        "training": checkpoint.training,
    }
    if wrong := _ill_formed(**parts):
        raise ValueError(f"checkpoint: {' and '.join(wrong)} of another type than Checkpoint declares")
    buffer = io.BytesIO()  # torch.save itself reports a full disk as a RuntimeError about positions
    torch.save(_Plain().copy({"format": FORMAT, "version": VERSION, **parts}, "", 0), buffer)
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def find_checkpoint(path: str | Path) -> Path:
    """The file itself, as given or beside the project: what is written later goes to where the weights lie.

    Raises:
        UserError: no such file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = sorted(path.glob("*.pt")) or sorted(path.glob("weights/*.pt"))
        raise UserError(f"{path}: is a folder; name the weights file in it{f', such as {inside[0]}' if inside else ''}")
    return find_file(path, [ROOT], "weights file (weights are not downloaded)")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Our own checkpoint or one of YOLOv5, on the CPU; nothing in the file is run.

    Raises:
        UserError: no such file, or not a whole checkpoint of either kind, or one that asks for what no checkpoint needs.
    """
    with Archive(find_checkpoint(path)) as archive:
        content = archive.content
        if isinstance(content, dict) and content.get("format") == FORMAT:
            return _read_own(archive, content)
        spec, names, state_dict = read_legacy(archive)
        return Checkpoint(spec, names, state_dict)


def _read_own(archive: Archive, content: dict[str, Any]) -> Checkpoint:
    version = content.get("version")
    if type(version) is not int or version > VERSION:
        newer = "a newer" if type(version) is int else "an unknown"
        raise UserError(f"{archive.path}: is of {newer} format version, this program reads up to {VERSION}: update the program")
    content = {"int8": False, **content}  # younger than the format
    parts = archive.plain({name: content.get(name) for name in ("spec", "names", "state_dict", "metrics", "imgsz", "int8", "training")})
    if wrong := _ill_formed(**parts):
        raise UserError(f"{archive.path}: its {' and '.join(wrong)} can't be understood: not a whole checkpoint")
    return Checkpoint(**{**parts, "names": tuple(parts["names"])})


def _ill_formed(spec: Any, names: Any, state_dict: Any, metrics: Any, imgsz: Any, int8: Any, training: Any) -> list[str]:
    """The names of those parts that have another form than save_checkpoint gives them."""
    well_formed = {
        "spec": isinstance(spec, dict),
        "names": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "state_dict": _is_mapping(state_dict, Tensor),
        "metrics": _is_mapping(metrics, float),
        "imgsz": imgsz is None or (type(imgsz) is int and 0 < imgsz <= _LARGEST_IMGSZ),
        "int8": isinstance(int8, bool),
        "training": training is None or isinstance(training, dict),
    }
    return [name for name, well in well_formed.items() if not well]


def _is_mapping(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and isinstance(item, kind) for key, item in value.items())


class _Plain:
    """Copies a tree of tensors and plain data, and refuses all else."""

    def __init__(self) -> None:
        self.nodes = 0

    def copy(self, node: Any, place: str, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise ValueError(f"checkpoint: {place} is nested deeper than {MAX_DEPTH} or the whole has over {MAX_NODES} values: use tensors")
        kind = type(node)
        if kind is int and not -(2**63) <= node < 2**63:
            raise ValueError(f"checkpoint: {place} is a number beyond 64 bits")
        if node is None or kind in (bool, int, float):
            return node
        if kind is str:
            node.encode()
            return node
        if kind is dict:
            if not all(type(key) is str or (type(key) is int and -(2**63) < key < 2**63) for key in node):
                raise ValueError(f"checkpoint: the keys of {place} must be text or whole numbers")
            return {key: self.copy(value, f"{place}.{key}" if place else str(key), depth + 1) for key, value in node.items()}
        if kind in (list, tuple):
            return kind(self.copy(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(node))
        if isinstance(node, Tensor):
            return _compact(node, place)
        raise ValueError(f"checkpoint: {place} is a {kind.__module__}.{kind.__qualname__}, neither a tensor nor plain data")


def _compact(tensor: Tensor, place: str) -> Tensor:
    """The tensor as stored: dense, on the CPU, without history and with a storage of its own size."""
    if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES or tensor.is_meta:
        raise ValueError(f"checkpoint: {place} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, which can't be stored")
    tensor = tensor.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole else tensor.clone()
