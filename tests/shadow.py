"""A device that computes on the CPU and refuses, as CUDA does, to mix its tensors with the CPU's or to show them to NumPy. For a process of its own.

`python shadow.py` takes the main of each script through it on a tiny data set.
"""
from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "shadow"
_COPIES = ("aten::_copy_from", "aten::copy_", "aten::_to_copy")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")  # an index may lie on the CPU; what is indexed may not


class Shadow(torch.Tensor):
    """A tensor of the device, around the CPU's that computes for it."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Shadow:
        self = torch.Tensor._make_wrapper_subclass(cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
                                                   device=torch.device(DEVICE, 0))
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, op: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(op, *args, **(kwargs or {}))

    def numpy(self, *, force: bool = False) -> np.ndarray:
        if not force:
            raise TypeError("a tensor of another device has no array")
        return self.detach().cpu().numpy()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device} | options)


def compute(op: Callable, *args: Any, **kwargs: Any) -> Any:
    name, tensors = op._schema.name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    shadows = [tensor for tensor in tensors if isinstance(tensor, Shadow)]
    checked = [args[0], *args[2:]] if name in _INDEXED else tensors
    if shadows and name not in _COPIES and any(isinstance(t, torch.Tensor) and not isinstance(t, Shadow) and t.ndim for t in checked):
        raise RuntimeError(f"{name}: tensors of two devices")
    if name == "aten::_copy_from":
        (args[1].raw if isinstance(args[1], Shadow) else args[1]).copy_(args[0].raw if isinstance(args[0], Shadow) else args[0])
        return args[1]
    with torch.no_grad():
        made = op(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return made
    own = {id(shadow.raw): shadow for shadow in shadows}  # of what was changed in place
    return tree_map(lambda leaf: own.get(id(leaf), Shadow(leaf)) if isinstance(leaf, torch.Tensor) else leaf, made)


def _raw(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.raw if isinstance(leaf, Shadow) else leaf


def _made_elsewhere(make: Callable) -> Callable:
    """PyTorch fills these outside of the dispatcher."""

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        tensor = make(*args, **options)
        return tensor if device is None else tensor.to(device)

    return made


def register() -> None:
    global _library
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    _library = torch.library.Library("_", "IMPL")
    _library.fallback(compute, "PrivateUse1")
    for name in ("tensor", "as_tensor", "arange", "linspace"):
        setattr(torch, name, _made_elsewhere(getattr(torch, name)))
    torch.inference_mode = torch.no_grad  # its tensors can't be wrapped
    torch.cuda.synchronize = lambda device: None


def scripts(folder: Path) -> None:
    """Each script's main, with this device for its own; `--precision fp32`, for it knows no other."""
    import utils.device

    utils.device.select_device = lambda name="": torch.device(DEVICE, 0)
    utils.device.compute_dtype = lambda precision, device: torch.float32
    utils.device.machine = lambda device: DEVICE
    from tiny import train_flags

    import compare
    import detect
    import prune
    import quantize
    import train
    import val
    from models.detector import Detector

    flags = [*train_flags(folder, train=16), "--epochs", "1", "--batch-size", "8"]
    data, best = flags[flags.index("--data") + 1], str(folder / "runs/exp/weights/best.pt")
    shown = ["--weights", best, "--imgsz", "64", "--project", str(folder / "out")]
    runs = [
        (train, flags), (train, ["--resume", best.replace("best", "last"), "--epochs", "2"]),
        (train, [*flags[2:], "--weights", best, "--qat"]), (train, [*flags, "--teacher", best, "--distill-features", "1"]),
        (train, [*flags, "--slim", "1e-4"]), (train, [*flags, "--rect", "--freeze", "1"]),
        (train, [*flags, "--soft-prune", "fpgm", "--optimizer", "AdamW", "--image-weights", "--multi-scale"]),
        (val, [*shown, "--data", data, "--augment"]), (detect, [*shown, "--source", str(folder / "images/val")]),
        (prune, [*shown, "--data", data, "--target-flops", "0.7", "--candidates", "2", "--round-to", "2"]),
        (compare, [*shown[2:], "--weights", best, "--data", data, "--runtimes", "pytorchfp32"]),
        (quantize, [*shown[:4], "--data", data, "--to", "onnx", "--calib", "8"]),
    ]
    for script, argv in runs:
        print(script.__name__, *argv, flush=True)
        code = script.main(argv)
        assert code == 0, code
    images = [np.zeros((64, 80, 3), np.uint8), torch.rand(3, 64, 64).to(DEVICE)]
    assert len(Detector(best)(images)) == 2


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    register()
    with tempfile.TemporaryDirectory() as place:
        scripts(Path(place))
