"""A Core ML package computed without Core ML: the program that is stored in it, operator by operator, in PyTorch.

Written from the definitions of the MIL operators in coremltools' documentation, so that a file can be judged where there is no Mac.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


def _padding(pad_type: str, pad: Any) -> tuple[int, int]:
    assert pad_type == "valid" or (pad_type == "custom" and list(pad[::2]) == list(pad[1::2])), (pad_type, pad)
    return (0, 0) if pad_type == "valid" else (int(pad[0]), int(pad[2]))


def conv(x: Tensor, weight: Tensor, strides: Any, pad_type: str, dilations: Any, groups: int, pad: Any = None, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, tuple(strides), _padding(pad_type, pad), tuple(dilations), groups)


def max_pool(x: Tensor, kernel_sizes: Any, strides: Any, pad_type: str, ceil_mode: bool, pad: Any = None) -> Tensor:
    return F.max_pool2d(x, tuple(kernel_sizes), tuple(strides), _padding(pad_type, pad), ceil_mode=bool(ceil_mode))


def avg_pool(
    x: Tensor, kernel_sizes: Any, strides: Any, pad_type: str, exclude_padding_from_average: bool, ceil_mode: bool, pad: Any = None
) -> Tensor:
    return F.avg_pool2d(x, tuple(kernel_sizes), tuple(strides), _padding(pad_type, pad), bool(ceil_mode), not exclude_padding_from_average)


def upsample(x: Tensor, scale_factor_height: float, scale_factor_width: float) -> Tensor:
    return F.interpolate(x, scale_factor=(float(scale_factor_height), float(scale_factor_width)), mode="nearest")


def concat(values: list[Tensor], axis: int, interleave: bool) -> Tensor:
    assert not interleave
    return torch.cat(values, int(axis))


def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Any = None) -> tuple[Tensor, ...]:
    return x.tensor_split(int(num_splits), int(axis)) if split_sizes is None else x.split([int(size) for size in split_sizes], int(axis))


def slice_by_index(
    x: Tensor, begin: Any, end: Any, stride: Any = None, begin_mask: Any = None, end_mask: Any = None, squeeze_mask: Any = None
) -> Tensor:
    none = [False] * x.dim()
    stride, begin_mask, end_mask = ([1] * x.dim() if stride is None else stride, *(none if m is None else m for m in (begin_mask, end_mask)))
    assert squeeze_mask is None or not any(squeeze_mask)
    return x[tuple(slice(None if b_all else int(b), None if e_all else int(e), int(s))
                   for b, e, s, b_all, e_all in zip(begin, end, stride, begin_mask, end_mask, strict=True))]


OPERATORS: dict[str, Callable[..., Any]] = {
    "conv": conv, "max_pool": max_pool, "avg_pool": avg_pool, "upsample_nearest_neighbor": upsample, "concat": concat, "split": split,
    "slice_by_index": slice_by_index,
    "silu": lambda x: F.silu(x), "relu": lambda x: F.relu(x), "sigmoid": lambda x: x.sigmoid(), "relu6": lambda x: F.relu6(x),
    "thresholded_relu": lambda x, alpha: torch.where(x >= float(alpha), x, torch.zeros_like(x)),
    "leaky_relu": lambda x, alpha: F.leaky_relu(x, float(alpha)),
    "sigmoid_hard": lambda x, alpha, beta: (x * float(alpha) + float(beta)).clamp(0, 1),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "mul": lambda x, y: x * y, "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "real_div": lambda x, y: x / y,
    "reduce_mean": lambda x, axes, keep_dims: x.mean([int(axis) for axis in axes], bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape([int(side) for side in shape]),
    "transpose": lambda x, perm: x.permute([int(axis) for axis in perm]),
    "gather": lambda x, indices, axis, **checks: x.index_select(int(axis), torch.as_tensor(np.asarray(indices), dtype=torch.int64)),
    "cast": lambda x, dtype: x.to(DTYPES[str(dtype)]),
}  # fmt: skip


class StoredProgram:
    """The program of a package; takes pictures by name and gives arrays by name, as Core ML's own model does.

    Raises:
        NotImplementedError: for an operator without a definition here.
    """

    def __init__(self, package: Path) -> None:
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.models import MLModel

        model = MLModel(str(package), skip_model_load=True)
        spec = model.get_spec()
        self.main = load(spec, spec.specificationVersion, model.weights_dir).functions["main"]

    @torch.no_grad()
    def predict(self, pictures: dict[str, Image.Image]) -> dict[str, np.ndarray]:
        known: dict[Any, Any] = {}
        for name, variable in self.main.inputs.items():
            known[variable] = torch.from_numpy(np.asarray(pictures[name]).copy()).permute(2, 0, 1)[None].float()
            assert tuple(known[variable].shape) == tuple(map(int, variable.shape))

        def value(variable: Any) -> Any:
            if isinstance(variable, list | tuple):
                return [value(each) for each in variable]
            if variable in known:
                return known[variable]
            stored = variable.val
            return torch.from_numpy(np.array(stored)) if isinstance(stored, np.ndarray) and stored.dtype.kind == "f" else stored

        for op in self.main.operations:
            if op.op_type == "const":
                continue
            if op.op_type not in OPERATORS:
                raise NotImplementedError(op.op_type)
            given = {name: value(v) for name, v in op.inputs.items() if v is not None}
            made = OPERATORS[op.op_type](**given)
            for variable, tensor in zip(op.outputs, made if isinstance(made, tuple | list) else (made,), strict=True):
                expected = DTYPES[{"fp16": "fp16", "fp32": "fp32", "double": "fp32"}.get(variable.dtype.__name__, "int32")]
                assert tensor.dtype == expected and tuple(tensor.shape) == tuple(map(int, variable.shape)), (op.op_type, variable.name)
                known[variable] = tensor
        return {variable.name: known[variable].numpy() for variable in self.main.outputs}
