"""Where each channel of a network goes, found by letting numbers travel with the tensors through one forward pass.

Every channel that a convolution makes gets a number of its own. Whatever moves channels (concatenation, slices, ShuffleNet's shuffle) moves their
numbers by the same operation; whatever joins two of them (a residual sum, a gate) ties their numbers; what mixes channels in a way that a missing one
would change (layer norm, attention, the outputs) ties them to number 0, which stays. So no rule speaks of a block: a user's own blocks and other
libraries' backbones are followed as far as they are made of such operations.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.compress.calls import Call, along_channels, arguments, replaced, same_lines, tensors_of
from utils.compress.ties import representatives

KEPT = 0  # the number that can't be removed
_NORM_WORK = 4  # multiply-accumulates of a value, as thop counts them
_ONE_BY_ONE = {
    "relu", "relu_", "silu", "silu_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "sigmoid", "sigmoid_", "leaky_relu", "leaky_relu_",
    "gelu", "mish", "elu", "elu_", "celu", "celu_", "selu", "selu_", "softplus",
    "relu6", "hardtanh", "hardtanh_", "tanh", "tanh_", "clamp", "clamp_", "dropout", "dropout2d", "contiguous",
    "clone", "to", "type_as", "float", "detach",
}  # fmt: skip
_IN_EACH_CHANNEL = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample", "pad"}
_JOINS = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__rsub__", "mul", "mul_", "__mul__", "__rmul__", "__imul__",
          "div", "div_", "__truediv__", "__rdiv__", "__itruediv__", "prelu"}
_MOVES = {"cat", "concat", "stack", "permute", "transpose", "swapaxes", "movedim", "flatten", "unsqueeze", "squeeze"}
_MOVES_BY_NUMBERS = {"view", "reshape", "unflatten", "__getitem__", "chunk", "split", "expand", "unbind", "index_select"}


class Layer(NamedTuple):
    """A convolution or a linear layer: what it multiplies."""

    weight: str  # its key in the state dict
    inputs: np.ndarray  # (c1,) a number for each channel
    outputs: np.ndarray  # (c2,)
    groups: int
    work: int  # multiply-accumulates of one input channel to one output channel
    out_dim: int  # of the weight, along which its filters lie


class Trace(NamedTuple):
    """Numbers are representatives of what is tied together."""

    uses: dict[str, tuple[np.ndarray | None, ...]]  # key of the state dict -> for each of the tensor's dimensions the channels along it
    moves: dict[str, tuple[np.ndarray, ...]]  # module that rearranges channels -> those of each of its inputs
    layers: list[Layer]
    each: list[tuple[np.ndarray, int]]  # channels of a bias or a norm, and the multiply-accumulates that each costs
    kept_whole: dict[str, str]  # module -> the operation that keeps its channels whole


def trace_channels(model: nn.Module, images: Tensor) -> Trace:
    """Follow the channels of a network in eval mode for some images (B, 3, H, W); the smaller, the faster."""
    tracer = _Tracer(model)
    with torch.no_grad():
        tracer.run(images)
    return tracer.result()


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.keys = {id(tensor): key for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self.numbered: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the tensor is kept so that its id stays its own. Numbers of its own shape
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.count = 1  # numbers given so far
        self.uses: dict[str, tuple[np.ndarray | None, ...]] = {}
        self.moves: dict[str, tuple[np.ndarray, ...]] = {}
        self.layers: list[Layer] = []
        self.each: list[tuple[np.ndarray, int]] = []
        self.kept_whole: dict[str, str] = {}
        self.inside: list[str] = []  # names of the modules that are running
        self.rearranging = 0  # how many of them say how they rearrange channels

    def run(self, images: Tensor) -> None:
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                hooks.callback(module.register_forward_pre_hook(lambda m, inputs, name=name: self._enter(name, m, inputs)).remove)
                hooks.callback(module.register_forward_hook(lambda m, *_: self._leave(m)).remove)
            self._give(images, torch.zeros(1, dtype=torch.int64).expand(images.shape))
            with self:
                outputs = self.model(images)
            for output in tensors_of(outputs):
                self._keep(self._numbers(output))

    def result(self) -> Trace:
        root = representatives(self.count, self.ties)
        uses = {key: tuple(None if dim is None else root[dim] for dim in dims) for key, dims in self.uses.items() if dims}
        moves = {name: tuple(root[numbers] for numbers in inputs) for name, inputs in self.moves.items()}
        layers = [layer._replace(inputs=root[layer.inputs], outputs=root[layer.outputs]) for layer in self.layers]
        return Trace(uses, moves, layers, [(root[channels], work) for channels, work in self.each], self.kept_whole)

    def _enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.inside.append(name)
        if hasattr(module, "narrowed"):
            self.rearranging += 1
            own = tuple(self._channels(x) for x in tensors_of(inputs))
            self.ties += zip(own, self.moves.setdefault(name, own), strict=True)  # as it may run twice

    def _leave(self, module: nn.Module) -> None:
        self.inside.pop()
        self.rearranging -= hasattr(module, "narrowed")

    def __torch_function__(self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = [x for x in tensors_of((args, kwargs)) if id(x) in self.numbered]
        made = list(tensors_of(args[0] if name == "__setitem__" else result))  # what is written into gives nothing back
        if given and made:
            rule = _RULES.get(name, _Tracer._unknown)
            rule(self, Call(func, name, args, kwargs, given, made))
        return result

    # Rules: what a call does to numbers.

    def _one_by_one(self, call: Call) -> None:
        x, *others = tensors_of((call.args, call.kwargs))
        if call.name in ("to", "type_as"):
            others = []  # what it is to be like
        if id(x) not in self.numbered and not others:
            return  # such as a learned scale: it has nothing of the image
        if id(x) not in self.numbered or any(other.numel() > 1 for other in others):  # such as bounds of each channel's own
            return self._unknown(call)
        self._give(call.made[0], self._numbers(x))

    def _in_each_channel(self, call: Call) -> None:
        x, y = call.given[0], call.made[0]
        if x.dim() != 4 or y.shape[:2] != x.shape[:2]:
            return self._unknown(call)
        self._give(y, along_channels(torch.from_numpy(self._channels(x)), y))

    def _mean(self, call: Call) -> None:
        dims = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
        spatial = call.given[0].dim() == 4 and isinstance(dims, list | tuple) and set(dims) <= {2, 3, -1, -2} and call.made[0].dim() == 4
        return self._in_each_channel(call) if spatial else self._unknown(call)

    def _join(self, call: Call) -> None:
        others = [x for x in tensors_of((call.args, call.kwargs)) if id(x) not in self.numbered and x.numel() > 1]
        if others:  # such as a learned scale for each channel
            return self._unknown(call)
        made = call.made[0]
        numbers = [self._numbers(x).expand(made.shape) for x in call.given]
        spread = [self._is_spread(x, made, numbers) for x in call.given]
        if all(spread):
            return self._unknown(call)
        for x in (x for x, wide in zip(call.given, spread, strict=True) if wide):  # such as a gate of one channel for all: it stays
            self.kept_whole.setdefault(self.inside[-1] if self.inside else "", f"{call.name} over all channels")
            self._keep(self._numbers(x))
        first, *others = (own for own, wide in zip(numbers, spread, strict=True) if not wide)
        for other in others:
            self._tie(first, other)
        self._give(made, first)

    def _is_spread(self, x: Tensor, made: Tensor, numbers: list[Tensor]) -> bool:
        """Whether one value of it meets several channels."""
        sides = [1] * (made.dim() - x.dim()) + list(x.shape)
        wide = [dim for dim, (own, side) in enumerate(zip(sides, made.shape, strict=True)) if own == 1 < side]
        return any(bool((other != other.narrow(dim, 0, 1)).any()) for dim in wide for other in numbers)

    def _move(self, call: Call) -> None:
        def numbers_of(x: Tensor) -> Tensor:
            # Whole numbers are places. A view of the numbers must be possible wherever one of the values is: so they are laid out in full.
            return self._numbers(x).contiguous() if x.is_floating_point() else x.cpu()

        numbers = call.func(*replaced(call.args, numbers_of), **replaced(call.kwargs, numbers_of))
        if call.name in _MOVES_BY_NUMBERS and not self.rearranging and not same_lines(self._numbers(call.given[0]), list(tensors_of(numbers))):
            return self._unknown(call)
        for made, own in zip(call.made, tensors_of(numbers), strict=True):
            self._give(made, own)

    def _convolve(self, call: Call) -> None:
        x, weight, bias, _, _, _, groups = arguments(call, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"), (None,) * 4 + (1,))
        self._multiply(call, nn.Conv2d, (x, weight, bias), groups, 0)

    def _convolve_transposed(self, call: Call) -> None:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        x, weight, bias, *_, groups, _ = arguments(call, names, (None,) * 4 + (1, None))
        self._multiply(call, nn.ConvTranspose2d, (x, weight, bias), groups, 1)

    def _linear(self, call: Call) -> None:
        x, weight, bias = arguments(call, ("input", "weight", "bias"), (None,))
        y, key = call.made[0], self.keys.get(id(weight))
        ins = self._along_last(x)
        if key in self.uses or ins is None or not self._is_of(nn.Linear, weight, bias):
            return self._unknown(call)
        outs = self._new(len(weight))
        self._use(weight, (outs, ins))
        self._use(bias, (outs,))
        self.layers.append(Layer(key, ins, outs, 1, y[..., 0].numel(), 0))
        if bias is not None:
            self.each.append((outs, y[..., 0].numel()))
        self._give(y, torch.from_numpy(outs).expand(y.shape))

    def _normalise(self, call: Call) -> None:
        x = call.given[0]
        own = [tensor for tensor in tensors_of((call.args, call.kwargs)) if tensor is not x]
        if own and not self._is_of(nn.modules.batchnorm._NormBase, *own):
            return self._unknown(call)
        channels = self._channels(x)
        for tensor in own:
            self._use(tensor, (channels,))
        self.each.append((channels, _NORM_WORK * x[:, 0].numel()))
        self._give(call.made[0], self._numbers(x))

    def _unknown(self, call: Call) -> None:
        """All that goes in is kept whole, and all that comes out."""
        if any(bool((self._numbers(x) != KEPT).any()) for x in call.given):
            self.kept_whole.setdefault(self.inside[-1] if self.inside else "", call.name)
        for x in call.given:
            self._keep(self._numbers(x))
        for tensor in tensors_of((call.args, call.kwargs)):
            if key := self.keys.get(id(tensor)):
                for numbers in self.uses.get(key, ()):  # used in another way elsewhere
                    if numbers is not None:
                        self._keep(torch.from_numpy(numbers))
                self.uses[key] = ()  # whole, whatever else uses it
        for made in call.made:
            self._give(made, torch.zeros(1, dtype=torch.int64).expand(made.shape))

    # What the rules are made of.

    def _multiply(self, call: Call, kind: type[nn.Module], tensors: tuple[Tensor, Tensor, Tensor | None], groups: int, out_dim: int) -> None:
        """A convolution whose weight has its output channels along `out_dim` and its input channels along the other of the first two."""
        (x, weight, bias), y = tensors, call.made[0]
        key, ins = self.keys.get(id(weight)), self._channels(x)
        if key in self.uses:
            return self._unknown(call._replace(name="a shared weight"))
        if not self._is_of(kind, weight, bias):
            return self._unknown(call._replace(name=f"{call.name} with {'a weight of its own' if key else 'a computed weight'}"))
        per_group, many = len(ins) // groups, y.shape[1] // groups
        if groups > 1 and per_group == 1:  # depthwise: an output channel is its input's
            outs = ins.repeat(many)
        else:
            outs = self._new(y.shape[1])
            if groups > 1:  # each group loses the same ones
                for numbers in (ins.reshape(groups, -1), outs.reshape(groups, -1)):
                    self.ties += [(numbers[0], other) for other in numbers[1:]]
        of_weight = (outs, ins[:per_group]) if out_dim == 0 else (ins, outs[:many])
        if groups > 1 and per_group == 1:
            of_weight = (outs, None) if out_dim == 0 else (ins, None)
        self._use(weight, (*of_weight, None, None))
        self._use(bias, (outs,))
        positions = (y if out_dim == 0 else x)[:, 0].numel()
        self.layers.append(Layer(key, ins, outs, groups, positions * weight[0, 0].numel(), out_dim))
        if bias is not None:
            self.each.append((outs, y[:, 0].numel()))
        self._give(y, along_channels(torch.from_numpy(outs), y))

    def _is_of(self, kind: type[nn.Module], *tensors: Tensor | None) -> bool:
        """Whether all of these are one module's of that kind, which models/narrow.py knows how to narrow."""
        homes = {self.keys.get(id(tensor), "").rpartition(".")[0] for tensor in tensors if tensor is not None}
        return len(homes) == 1 and isinstance(self.model.get_submodule(homes.pop()), kind)

    def _give(self, tensor: Tensor, numbers: Tensor) -> None:
        self.numbered[id(tensor)] = tensor, numbers

    def _numbers(self, tensor: Tensor) -> Tensor:
        """Those of each value; what is made of nothing that flows from the image, such as a learned position, is kept."""
        known = self.numbered.get(id(tensor))
        return known[1] if known else torch.zeros(1, dtype=torch.int64).expand(tensor.shape)

    def _channels(self, x: Tensor) -> np.ndarray:
        """(C,) of x (B, C, …). Values of one channel that have several numbers, such as pixels that were channels, tie them."""
        numbers = self._numbers(x).transpose(0, 1).flatten(1)  # (C, values)
        first = numbers[:, :1]
        if bool((numbers != first).any()):
            self._tie(first.expand(numbers.shape), numbers)
        return first[:, 0].numpy().copy()

    def _along_last(self, x: Tensor) -> np.ndarray | None:
        """(C,) of x (…, C); None where they differ from place to place."""
        numbers = self._numbers(x).flatten(0, -2)
        return None if bool((numbers != numbers[:1]).any()) else numbers[0].numpy().copy()

    def _new(self, count: int) -> np.ndarray:
        self.count += count
        return np.arange(self.count - count, self.count)

    def _use(self, tensor: Tensor | None, dims: tuple[np.ndarray | None, ...]) -> None:
        if tensor is None or not (key := self.keys.get(id(tensor))):
            return
        if key in self.uses:  # such as a norm that two branches share
            self.ties += zip(dims, self.uses[key] or [np.full_like(numbers, KEPT) for numbers in dims], strict=True)
        else:
            self.uses[key] = dims

    def _tie(self, a: Tensor, b: Tensor) -> None:
        pairs = torch.stack((a.reshape(-1), b.reshape(-1))).unique(dim=1).numpy()
        self.ties.append((pairs[0], pairs[1]))

    def _keep(self, numbers: Tensor) -> None:
        values = numbers.unique().numpy()
        self.ties.append((values, np.full_like(values, KEPT)))


_RULES: dict[str, Callable[[_Tracer, Call], None]] = {
    **dict.fromkeys(_ONE_BY_ONE, _Tracer._one_by_one),
    **dict.fromkeys(_IN_EACH_CHANNEL, _Tracer._in_each_channel),
    **dict.fromkeys(_JOINS, _Tracer._join),
    **dict.fromkeys(_MOVES | _MOVES_BY_NUMBERS, _Tracer._move),
    "mean": _Tracer._mean,
    "conv2d": _Tracer._convolve,
    "conv_transpose2d": _Tracer._convolve_transposed,
    "linear": _Tracer._linear,
    "batch_norm": _Tracer._normalise,
    "instance_norm": _Tracer._normalise,
}
