"""YOLOv5's pickled networks as data: architecture, class names and weights, gathered from inert instances."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from utils.archive import EXPECTED, Archive
from utils.errors import UserError
from utils.unpickle import Global, Instance, TensorRef

_SPEC_KEYS = ("nc", "depth_multiple", "width_multiple", "anchors", "activation", "backbone", "head")
_MAX_PARTS = 100_000  # modules, or tensors; a yolov5x6 has under 2,000
_MAX_NAME = 500  # of a tensor, in characters


class LegacyNetwork(NamedTuple):
    spec: dict[str, Any]  # the keys of a YOLOv5 model YAML
    names: tuple[str, ...]
    state_dict: dict[str, Tensor]  # `model.0.conv.weight`, …, in the file's own precision


def read_legacy(archive: Archive) -> LegacyNetwork:
    """The network of a file of YOLOv5: its `ema` where there is one, else its `model`.

    `nc` is the number of names, `anchors` are those that the head was trained with, in pixels.

    Raises:
        UserError: another kind of content, or one that contradicts itself.
    """
    path, model = archive.path, _find_model(archive)
    yaml, layers = model.get("yaml"), _children(_children(model).get("model"))
    if model.cls.module.startswith("ultralytics."):
        raise UserError(f"{path}: holds an ultralytics {model.cls.name}; only networks with anchors, of YOLOv5 itself, are read")
    if not isinstance(yaml, dict) or not layers:
        raise UserError(f"{path}: holds a {model.cls}, which carries no YOLOv5 YAML: not a YOLOv5 network")
    head = list(layers.values())[-1]
    if head.cls.name in ("Segment", "Classify"):
        raise UserError(f"{path}: ends in {head.cls.name}, not in Detect: only detectors are read, no networks that segment or classify")
    spec = {key: archive.plain(yaml[key]) for key in _SPEC_KEYS if yaml.get(key) is not None}
    if yaml.get("ch") not in (None, 3):
        spec["ch"] = archive.plain(yaml["ch"])  # which says why it can't be taken
    names = _names(archive.plain(model.get("names")), head.get("nc"), archive)
    spec["nc"] = len(names)
    spec["anchors"] = _anchors(archive, head) or spec.get("anchors")
    if "activation" not in spec and (activation := _activation(archive, model)):
        spec["activation"] = activation
    tensors = {key: archive.tensor(ref) for key, ref in _tensors(archive, model)}
    if any(key.endswith(".conv.bias") for key in tensors) and not any(".bn." in key for key in tensors):
        spec["fused"] = True  # saved after fuse(), as programs do that only detect
    return LegacyNetwork(spec, names, tensors)


def _find_model(archive: Archive) -> Instance:
    content = archive.content
    tree = content if isinstance(content, dict) else {}
    model = next((part for part in (tree.get("ema"), tree.get("model"), content) if isinstance(part, Instance)), None)
    if model and model.cls.name in ("DataParallel", "DistributedDataParallel"):
        model = _children(model).get("module")
    if model:
        return model
    if any(isinstance(part, dict) and any(isinstance(value, TensorRef) for value in part.values()) for part in (tree, *tree.values())):
        raise UserError(f"{archive.path}: is a bare state_dict: tensors without the network's YAML, names and anchors; {EXPECTED}")
    found = f"a value of type {type(content).__name__}"
    if isinstance(content, dict):
        found = f"a dict of {', '.join(ascii(key) for key in content if isinstance(key, str)) or 'nothing'}"[:150]
    elif isinstance(content, TensorRef):
        found = "a bare tensor"
    elif isinstance(content, Global):
        found = str(content)
    raise UserError(f"{archive.path}: holds {found}; {EXPECTED}")


def _children(module: Any) -> dict[str, Instance]:
    """A module's submodules by name; {} where it is none."""
    modules = module.get("_modules") if isinstance(module, Instance) else None
    if not isinstance(modules, dict):
        return {}
    return {name: child for name, child in modules.items() if isinstance(name, str) and isinstance(child, Instance)}


def _modules(archive: Archive, root: Instance) -> Iterator[tuple[str, Instance]]:
    """Every module from `root` down with its prefix, as `nn.Module.named_modules` orders them; bounded, as a tree may contain itself."""
    stack, count = [("", root)], 0
    while stack:
        prefix, module = stack.pop()
        children = _children(module)
        count += len(children)
        _check_size(archive, count, len(prefix) + max(map(len, children), default=0))
        yield prefix, module
        stack += [(f"{prefix}{name}.", child) for name, child in reversed(children.items())]


def _check_size(archive: Archive, count: int, name_length: int) -> None:
    if count > _MAX_PARTS or name_length > _MAX_NAME:
        raise UserError(f"{archive.path}: its network is nested or repeated beyond measure: refused")


def _tensors(archive: Archive, root: Instance) -> Iterator[tuple[str, TensorRef]]:
    """What `state_dict()` would hold, less the anchor grid that old versions kept in the head (it repeats `anchors`)."""
    count = 0
    for prefix, module in _modules(archive, root):
        transient = module.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else set()  # not copied: many modules may share one
        for members in (module.get("_parameters"), module.get("_buffers")):
            for name, value in members.items() if isinstance(members, dict) else ():
                count += 1
                if not isinstance(name, str):
                    raise UserError(f"{archive.path}: its {prefix or 'network'} has a part whose name is no text")
                _check_size(archive, count, len(prefix) + len(name))
                if value is None or name == "anchor_grid" or name in transient:
                    continue
                if not isinstance(value, TensorRef):
                    raise UserError(f"{archive.path}: its {prefix}{name:.50} is no tensor")
                yield f"{prefix}{name}", value


def _names(names: Any, nc: Any, archive: Archive) -> tuple[str, ...]:
    """Names from a list, or from a dict in the order of its numbers; numbers where there are none."""
    if isinstance(names, dict):
        numbers = {key: int(key) for key in names if isinstance(key, int) or (isinstance(key, str) and key.isdecimal() and len(key) < 10)}
        names = [names[key] for key in sorted(names, key=lambda key: (key not in numbers, numbers.get(key, str(key))))]
    if not names and type(nc) is int and 0 < nc < _MAX_PARTS:
        names = range(nc)
    if not names or not isinstance(names, (list, tuple, range)) or not all(isinstance(name, (str, int, float)) for name in names):
        raise UserError(f"{archive.path}: its class names are neither a list nor a dict of text")
    if type(nc) is int and nc != len(names):
        raise UserError(f"{archive.path}: has {len(names)} class names for a head of {nc} classes")
    return tuple(map(str, names))


def _anchors(archive: Archive, head: Instance) -> list[list[float]] | None:
    """The head's anchors in pixels, a row of (w, h, w, h, …) a level; None where it has none of that form."""
    buffers = head.get("_buffers")
    refs = buffers.get("anchors") if isinstance(buffers, dict) else None, head.get("stride")
    if not all(isinstance(ref, TensorRef) for ref in refs) or len(refs[0].size) != 3 or refs[1].size != refs[0].size[:1]:
        return None
    anchors, stride = (archive.tensor(ref).double() for ref in refs)  # (levels, anchors, 2) in strides; (levels,)
    rows = (anchors * stride.view(-1, 1, 1)).flatten(1).tolist()
    return [[int(side) if side.is_integer() else side for side in row] for row in rows]


def _activation(archive: Archive, model: Instance) -> str | None:
    """The YAML text for the activation of most convolutions, or None for today's default: versions before 4.0 had others."""
    found = Counter()
    for prefix, act in _modules(archive, model):
        if prefix.endswith(".act.") and act.cls.module == "torch.nn.modules.activation":
            slope = act.get("negative_slope")
            found[f"nn.{act.cls.name}({slope if isinstance(slope, float) else ''})"] += 1
    activation = next(iter(found.most_common(1)), (None,))[0]
    return None if activation == "nn.SiLU()" else activation
