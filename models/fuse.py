"""A network for inference: branches made one, batch norm folded into the convolution before it: the same outputs, fewer passes over memory."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from models.layers import SlicedConv2d

Model = TypeVar("Model", bound=nn.Module)
_LARGER_PX = 256  # at which every network has run when it was built
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# timm's, known by name as timm may be absent: a convolution that pads by its input's size, and norms with what follows them as children.
_TIMM_CONV, _TIMM_NORMS = "Conv2dSame", ("BatchNormAct2d", "SyncBatchNormAct")


def fuse(model: Model, probe_px: int = 64) -> Model:
    """A new model in eval mode, re-parameterised, with every convolution -> batch norm pair folded: see `fold`."""
    fused = copy.deepcopy(model).eval()
    fold(fused, probe_px)
    return fused


@torch.no_grad()
def fold(model: nn.Module, probe_px: int = 64) -> None:
    """Merge branches and fold batch norms of a model in eval mode, in place; again, it does nothing.

    A block with branches to merge has a `reparameterize()` that does so in place, for all that it contains, at equal outputs. Pairs are found by
    running an image of `probe_px` and following the tensors, not by the names or the order of attributes, so that users' own blocks fold too.
    A convolution whose output has another use than its batch norm stays as it is.
    """
    _reparameterize(model)
    try:
        trace = _Trace.of(model, probe_px)
    except Exception:  # of any kind: a block of the user's may have a least size
        trace = _Trace.of(model, _LARGER_PX)
    parents = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    for conv, norm in trace.pairs():
        setattr(*parents[conv], fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, nn.ConvTranspose2d)))
        setattr(*parents[norm], nn.Sequential(*norm.children()) if any(norm.children()) else nn.Identity())


def _reparameterize(module: nn.Module) -> None:
    for child in module.children():
        if hasattr(child, "reparameterize"):
            child.reparameterize()
        else:
            _reparameterize(child)


def _is_foldable(module: nn.Module) -> bool:
    """Exactly PyTorch's convolutions: a class derived from them, such as one that computes its weight, may do something else with it."""
    kind = type(module)
    return kind in (nn.Conv2d, SlicedConv2d) or kind.__name__ == _TIMM_CONV or (kind is nn.ConvTranspose2d and module.groups == 1)


def _is_norm(module: nn.Module) -> bool:
    return (type(module) in _NORMS or type(module).__name__ in _TIMM_NORMS) and module.track_running_stats


class _Trace(TorchFunctionMode):
    """What each convolution's output is used for in one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.runs: dict[nn.Module, int] = {}
        self.outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # by id; the tensor is kept so that its id stays its own
        self.uses: dict[int, int] = {}
        self.norms: dict[nn.Module, int] = {}  # batch norm -> its input's id

    @classmethod
    def of(cls, model: nn.Module, px: int) -> _Trace:
        """Of an image of this side."""
        trace, parameter = cls(model), next(model.parameters())
        trace.run(torch.zeros(1, 3, px, px, device=parameter.device, dtype=parameter.dtype))
        return trace

    def run(self, image: Tensor) -> None:
        hooks = [m.register_forward_hook(self._after_convolution) for m in self.model.modules() if _is_foldable(m)]
        hooks += [m.register_forward_pre_hook(self._before_norm) for m in self.model.modules() if _is_norm(m)]
        try:
            with self:
                results = self.model(image)
        finally:
            for hook in hooks:
                hook.remove()
        self._use(results)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for norm, taken in self.norms.items():
            if self.uses[taken] == 1:
                conv = self.outputs[taken][0]
                if self.runs[conv] == self.runs[norm] == 1:
                    yield conv, norm

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, int | torch.Size | torch.dtype | torch.device | None):  # asking for the shape is no use
            self._use((args, kwargs))
        return result

    def _use(self, values: Any) -> None:
        if isinstance(values, Tensor):
            self.uses[id(values)] = self.uses.get(id(values), 0) + 1
        elif isinstance(values, tuple | list):
            for value in values:
                self._use(value)
        elif isinstance(values, dict):
            self._use(list(values.values()))

    def _after_convolution(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.runs[module] = self.runs.get(module, 0) + 1
        self.outputs[id(output)] = (module, output)
        self.uses[id(output)] = 0

    def _before_norm(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.runs[module] = self.runs.get(module, 0) + 1
        if inputs and id(inputs[0]) in self.outputs:  # only these are kept, so that only their ids stay their own
            self.norms[module] = id(inputs[0])
