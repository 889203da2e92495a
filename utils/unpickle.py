"""Read a pickle without running anything that it asks for.

A pickle is a program for a small stack machine. The machine here lacks the power to import or to call: a class becomes an inert
`Instance`, a tensor becomes a `TensorRef` into the file around it, and a name that no checkpoint needs is refused. Work, sizes and
keys are bounded by what real checkpoints need, so a hostile pickle can neither hang the reader nor fill the memory.
"""
from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
MAX_STEPS = 3_000_000  # a training checkpoint of yolov5x6 takes a tenth of it
_MAX_NAME = 200
_MAX_NUMBER_KEYS = 10_000  # whole numbers hash to themselves, so that chosen ones collide; each costs at most as many looks
_MAX_DIMS = 16
_LONG = 2**63

_CONTAINERS = {"set", "frozenset", "list", "dict", "tuple"}
_REBUILD_TENSOR = {"_rebuild_tensor", "_rebuild_tensor_v2"}
_REBUILD_PARAMETER = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
_ALLOWED_NAMES = {
    "collections": {"OrderedDict"},
    "__builtin__": _CONTAINERS,
    "builtins": _CONTAINERS,
    "torch": {*STORAGE_DTYPES, *(str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES.values()), "Size", "device"},
    "torch._utils": _REBUILD_TENSOR | _REBUILD_PARAMETER,
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "_codecs": {"encode"},  # how numpy's bytes are pickled; inert like the rest
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "argparse": {"Namespace"},
}
_ALLOWED_PACKAGES = ("models", "utils", "yolov5", "ultralytics", "torch.nn", "__main__")
_ALLOWED_PREFIXES = tuple(f"{package}." for package in _ALLOWED_PACKAGES)


class Refused(Exception):
    """The pickle asks for a name outside the allowed ones; the message is that name."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """The name of a class or function; nothing is imported for it."""

    module: str
    name: str

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}"[:_MAX_NAME]
        return text if text.isprintable() else ascii(text)


@dataclass(slots=True, eq=False)
class Instance:
    """What would have been an object: its class's name and the state it would have been given."""

    cls: Global
    state: Any = None

    def __repr__(self) -> str:
        return str(self.cls)  # the state may be endless

    def get(self, name: str) -> Any:
        """The attribute of that name, or None."""
        return self.state.get(name) if isinstance(self.state, dict) else None


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A view of a storage, counted in elements, that lies inside the storage's declared size."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def unpickle(data: bytes) -> Any:
    """The tree that a pickle describes: plain data, TensorRef, Instance and Global. It may share parts and contain itself.

    Raises:
        Refused: it asks for what no checkpoint needs.
        ValueError, IndexError, KeyError, TypeError, AttributeError: malformed or beyond the limits.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        machine.spend(1)
        if opcode.name in _LITERALS:
            if isinstance(argument, str) and not argument.isascii():
                argument.encode()  # a lone surrogate would break whoever prints it
            machine.stack.append(argument)
        elif opcode.name in _MAKERS:
            made = _MAKERS[opcode.name](machine, argument)
            machine.stack.append(made)
        elif opcode.name == "STOP":
            return machine.stack.pop()
        elif opcode.name not in _IGNORED:
            _ACTIONS[opcode.name](machine, argument)
    raise ValueError("its pickle has no end")


def find(module: Any, name: Any) -> Global:
    """The class or function of that name, if a checkpoint may need it."""
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a class whose name is no text")
    known = module in _ALLOWED_PACKAGES or module.startswith(_ALLOWED_PREFIXES) or name in _ALLOWED_NAMES.get(module, ())
    if not known or len(name) > _MAX_NAME or "." in name:  # a dotted name reaches through a module into those that it imports
        raise Refused(Global(module, name))
    return Global(module, name)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    """A tensor, once proven to lie in its storage and to name no element twice (an expanded view could grow without bound)."""
    size, stride, (offset,) = _whole_numbers(size), _whole_numbers(stride), _whole_numbers((offset,))
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise ValueError("a tensor without a storage, or with a size and a stride of different lengths")
    if 0 not in size:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= storage.numel or math.prod(size) > storage.numel:
            raise ValueError(f"a tensor of size {size}, stride {stride} and offset {offset} reaches beyond its storage of {storage.numel}")
    return TensorRef(storage, offset, size, stride)


def _whole_numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMS or not all(type(n) is int and 0 <= n < _LONG for n in value):
        raise ValueError("a tensor's size, stride and offset must be whole numbers >= 0")
    return tuple(value)


def _storage(identity: Any) -> Storage:
    """`("storage", type, key, location, numel)`: the only thing that torch keeps outside of the pickle."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise ValueError("a persistent id that is no storage")
    _, cls, key, _, numel, *_ = identity
    if not isinstance(cls, Global) or cls.module != "torch" or cls.name not in STORAGE_DTYPES:
        raise ValueError("a storage of unknown type")
    if not isinstance(key, str) or len(key) > _MAX_NAME:
        raise ValueError("a storage without a name")
    return Storage(key, STORAGE_DTYPES[cls.name], *_whole_numbers((numel,)))


def _fill(machine: _Machine, target: Any, pairs: list[Any]) -> Any:
    """Put keys and values, given in turn, into a dict. Of a dict's subclass, an Instance, nothing is needed."""
    if isinstance(target, Instance):
        return target
    if not isinstance(target, dict) or len(pairs) % 2:
        raise ValueError("a dict's items without a dict")
    machine.check_keys(pairs[::2])
    target.update(zip(pairs[::2], pairs[1::2], strict=True))
    return target


def _extend(_: _Machine, target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Instance):
        raise ValueError("a list's items without a list")


def _add(machine: _Machine, target: Any, items: list[Any]) -> None:
    if isinstance(target, set):
        machine.check_keys(items)
        target.update(items)
    elif not isinstance(target, Instance):
        raise ValueError("a set's items without a set")


class _Machine:
    """The stack, the marks, the memo, and the one way to make something: `construct`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0
        self.number_keys = 0

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ValueError(f"its pickle takes more than {MAX_STEPS} steps, no checkpoint does")

    def check_keys(self, keys: Sequence[Any]) -> None:
        """Only keys whose hash is quick and can't be made to collide: tuples nest, long integers and floats collide, and few whole numbers."""
        for key in keys:
            if not (key is None or isinstance(key, (str, bytes, Global, Instance)) or (isinstance(key, int) and -_LONG < key < _LONG)):
                raise ValueError(f"a {type(key).__name__} as a key")
        self.number_keys += sum(isinstance(key, int) for key in keys)
        if self.number_keys > _MAX_NUMBER_KEYS:
            raise ValueError(f"more than {_MAX_NUMBER_KEYS} whole numbers as keys")

    def construct(self, cls: Any, args: Any) -> Any:
        """What `cls(*args)` stands for: a container or a tensor for the few known names, an Instance for all others."""
        if not isinstance(cls, Global) or not isinstance(args, (tuple, list)):
            raise ValueError("calls what is no class")
        if cls.module == "torch._utils":
            return rebuild_tensor(*args[:_MAX_DIMS]) if cls.name in _REBUILD_TENSOR else args[0]
        if cls.module in ("builtins", "__builtin__", "collections") or (cls.module == "torch" and cls.name == "Size"):
            return self.container(cls.name, args[0] if args else ())
        return Instance(cls)

    def container(self, name: str, items: Any) -> Any:
        if not isinstance(items, (list, tuple, set)):
            raise ValueError(f"a {name} of what is no list")
        self.spend(len(items))
        if name in ("dict", "OrderedDict"):
            self.check_keys([key for key, _ in items])
            return dict(items)
        if name in ("set", "frozenset"):
            self.check_keys(list(items))
            return set(items)
        return list(items) if name == "list" else tuple(items)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        """Pop all since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def last(self, count: int) -> list[Any]:
        """Pop that many."""
        items = self.stack[-count:]
        if len(items) < count:
            raise ValueError("takes from an empty stack")
        del self.stack[-count:]
        return items

    def put(self, index: int) -> None:
        if not 0 <= index <= len(self.memo) + 1:  # picklers count, from 0 or from 1
            raise ValueError("a memo out of order")
        self.memo[index] = self.stack[-1]

    def build(self) -> None:
        """Keep the state as data. Nothing is set on anything, so no `__setstate__`, `__class__` or `__dict__` is reached."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Instance):
            self.stack[-1].state = state

    def change(self, how: Callable[[_Machine, Any, list[Any]], None], items: list[Any]) -> None:
        """Apply `how` to what lies below the items, which are off the stack by now."""
        how(self, self.stack[-1], items)


def _instantiate(machine: _Machine, cls: Any, *args: Any) -> Any:
    return machine.construct(cls, args)


def _refuse_extension(_: _Machine, code: int) -> None:
    raise Refused(f"extension code {code}")


# The instructions, by what they do; pickletools tells the meaning of each.
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_IGNORED = {"PROTO", "FRAME"}
_MAKERS: dict[str, Callable[[_Machine, Any], Any]] = {
    "NONE": lambda m, _: None,
    "NEWTRUE": lambda m, _: True,
    "NEWFALSE": lambda m, _: False,
    "EMPTY_DICT": lambda m, _: {},
    "EMPTY_LIST": lambda m, _: [],
    "EMPTY_SET": lambda m, _: set(),
    "EMPTY_TUPLE": lambda m, _: (),
    "DUP": lambda m, _: m.stack[-1],
    "GET": lambda m, index: m.memo[index],
    "BINGET": lambda m, index: m.memo[index],
    "LONG_BINGET": lambda m, index: m.memo[index],
    "TUPLE": lambda m, _: tuple(m.to_mark()),
    "TUPLE1": lambda m, _: tuple(m.last(1)),
    "TUPLE2": lambda m, _: tuple(m.last(2)),
    "TUPLE3": lambda m, _: tuple(m.last(3)),
    "LIST": lambda m, _: m.to_mark(),
    "DICT": lambda m, _: _fill(m, {}, m.to_mark()),
    "FROZENSET": lambda m, _: m.container("frozenset", m.to_mark()),
    "GLOBAL": lambda m, names: find(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: find(*m.last(2)),
    "INST": lambda m, names: m.construct(find(*names.split(" ", 1)), m.to_mark()),
    "OBJ": lambda m, _: _instantiate(m, *m.to_mark()),
    "REDUCE": lambda m, _: m.construct(*m.last(2)),
    "NEWOBJ": lambda m, _: m.construct(*m.last(2)),
    "NEWOBJ_EX": lambda m, _: m.construct(*m.last(3)[:2]),
    "BINPERSID": lambda m, _: _storage(m.stack.pop()),
}
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.stack.pop() if m.stack else m.to_mark(),
    "POP_MARK": lambda m, _: m.to_mark(),
    "PUT": lambda m, index: m.put(index),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "APPEND": lambda m, _: m.change(_extend, m.last(1)),
    "APPENDS": lambda m, _: m.change(_extend, m.to_mark()),
    "ADDITEMS": lambda m, _: m.change(_add, m.to_mark()),
    "SETITEM": lambda m, _: m.change(_fill, m.last(2)),
    "SETITEMS": lambda m, _: m.change(_fill, m.to_mark()),
    "BUILD": lambda m, _: m.build(),
    "EXT1": _refuse_extension,
    "EXT2": _refuse_extension,
    "EXT4": _refuse_extension,
}
