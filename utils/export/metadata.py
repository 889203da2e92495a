"""What an exported file says of itself, kept inside the file: text in an ONNX file's metadata_props or an OpenVINO model's rt_info."""
from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.extras import import_extra
from utils.files import is_text
from utils.nms import NmsOptions

if TYPE_CHECKING:
    import openvino

    from utils.export.graph import Detector

FOREIGN_KEYS = ("names", "stride", "args", "end2end")  # of other projects' files
KEY = "light_yolo"  # of our own text; `names` and `stride` lie beside it as Python literals, for programs that read YOLOv5's files
CONFIG = "config.txt"  # the text in which YOLOv5's TorchScript files tell their shape, stride and names, as JSON
FORMAT, VERSION = "light-yolo export", 1
PRECISIONS = ("fp32", "fp16", "int8")
_LARGEST_STRIDE, _LARGEST_SIDE = 1024, 1 << 14  # pixels: what images are padded to must fit in memory
_MEND = "export it again from its checkpoint"


@dataclass(frozen=True)
class GraphNms:
    """Non-maximum suppression inside a graph: what of it was fixed at export."""

    conf_thres: float
    iou_thres: float
    max_det: int

    def falls_short(self, options: NmsOptions) -> str | None:
        """Why the boxes are not those that a user asks for, in one line; None where they are, once filtered.

        A box may be suppressed by one that a stricter overlap, or another class, would have suppressed itself: both are gone then.
        """
        within = options.conf_thres >= self.conf_thres and options.iou_thres == self.iou_thres and options.max_det <= self.max_det
        if within and not options.agnostic:
            return None
        asked = f"{options.conf_thres:g}, {options.iou_thres:g} and {options.max_det}{' across classes' if options.agnostic else ''}"
        own = f"--conf-thres {self.conf_thres:g} --iou-thres {self.iou_thres:g} --max-det {self.max_det}"
        return (f"suppresses boxes itself, with {own} within classes: asked for {asked}, it gives what that leaves of those boxes; export it so, or "
                "without --nms, for all")


@dataclass(frozen=True)
class ExportMetadata:
    """Attributes:
    names: of the classes.
    strides: of the levels, pixels.
    max_stride: image sides must be multiples of it.
    imgsz: (height, width) that it was exported for, pixels; the only size that it takes unless dynamic.
    dynamic: takes any batch, height and width.
    anchors: of each level, width and height in pixels in turn.
    precision: of the weights, one of PRECISIONS.
    source: file name of the checkpoint.
    float_layers: of an int8 file those that stayed float.
    nms: where the graph suppresses boxes itself; None: its output is all boxes.
    """

    names: tuple[str, ...]
    strides: tuple[int, ...]
    max_stride: int
    imgsz: tuple[int, int]
    dynamic: bool
    anchors: tuple[tuple[float, ...], ...]
    precision: str
    source: str
    float_layers: tuple[str, ...] = ()
    nms: GraphNms | None = None

    @classmethod
    def of(cls, network: Detector, imgsz: tuple[int, int], *, dynamic: bool, precision: str, source: str,
           nms: GraphNms | None = None) -> ExportMetadata:
        """What the network tells of itself beside what its export does."""
        anchors = tuple(tuple(level.flatten().tolist()) for level in network.anchors_px)
        return cls(tuple(network.names), tuple(network.strides), network.max_stride, imgsz, dynamic, anchors, precision, source, nms=nms)

    def to_props(self) -> dict[str, str]:
        """As text by key."""
        own = json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)})
        return {KEY: own, "names": repr(dict(enumerate(self.names))), "stride": str(self.max_stride)}

    def to_content(self) -> dict[str, Any]:
        """As a mapping for YAML or JSON, with names, stride and image size where other programs look for them."""
        return {"names": dict(enumerate(self.names)), "stride": self.max_stride, "imgsz": list(self.imgsz), KEY: json.loads(self.to_props()[KEY])}


def metadata_from_props(props: Mapping[str, str], origin: str) -> ExportMetadata | None:
    """The metadata that `to_props` made; None where there is none, as in the files of other projects.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    if KEY not in props:
        return None
    try:
        content = json.loads(props[KEY])
        version = content.pop("version")
        if content.pop("format") != FORMAT or type(version) is not int:
            raise ValueError
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise UserError(f"{origin}: its metadata {KEY} can't be read: {_MEND}") from None
    if version > VERSION:
        raise UserError(f"{origin}: is of a newer format version, this program reads up to {VERSION}: update the program")
    content.setdefault("float_layers", [])  # younger than the format
    if _WELL_FORMED["strides"](content.get("strides")):
        content.setdefault("max_stride", max(content["strides"]))
    wrong = [name for name, check in _WELL_FORMED.items() if not check(content.get(name))]
    if wrong:
        raise UserError(f"{origin}: its metadata's {' and '.join(wrong)} can't be understood: {_MEND}")
    nms = content.pop("nms", None)
    return ExportMetadata(**{name: _tuples(content[name]) for name in _WELL_FORMED if name != "nms"}, nms=nms and GraphNms(**nms))


def props_from_content(content: Mapping[str, Any]) -> dict[str, str]:
    """The text by key of what `to_content` made, or another project; JSON has numbers that are keys as text."""
    names = content.get("names")
    if isinstance(names, dict) and names.keys() == {str(n) for n in range(len(names))}:
        content = content | {"names": [names[str(n)] for n in range(len(names))]}
    props = {key: repr(content[key]) for key in FOREIGN_KEYS if key in content}
    return props | ({KEY: json.dumps(content[KEY], default=str)} if KEY in content else {})


def foreign_facts(props: Mapping[str, str]) -> tuple[tuple[str, ...], int | None]:
    """Class names and largest stride as YOLOv5's own exports tell them, in Python literals; nothing, and None, where they don't."""
    names, stride = _literal(props.get("names")), _literal(props.get("stride"))
    if isinstance(names, dict):
        names = [names.get(n) for n in range(len(names))]
    found = tuple(names) if isinstance(names, list | tuple) and all(map(_is_name, names)) else ()
    return found, stride if _is_stride(stride) else None


def tells_final_boxes(props: Mapping[str, str]) -> bool:
    """Whether another project's file says that it suppresses boxes itself."""
    arguments = _literal(props.get("args"))
    return _literal(props.get("end2end")) is True or (isinstance(arguments, dict) and bool(arguments.get("nms")))


def stamp_onnx(path: Path, metadata: ExportMetadata) -> None:
    """Write metadata into an ONNX file; what it says otherwise stays."""
    onnx = import_extra("onnx")
    model = onnx.load(str(path))
    kept = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, kept | metadata.to_props())
    onnx.save(model, str(path))


def stamp_openvino(model: openvino.Model, metadata: ExportMetadata) -> None:
    """Write metadata into an OpenVINO model, which takes it along when it is saved."""
    for key, value in metadata.to_props().items():
        model.set_rt_info(value, [key])


def openvino_props(model: openvino.Model) -> dict[str, str]:
    """What `stamp_openvino` wrote, or another project, as far as it is there."""
    return {key: str(model.get_rt_info([key]).value) for key in (KEY, *FOREIGN_KEYS) if model.has_rt_info([key])}


def _literal(text: str | None) -> Any:
    try:
        return ast.literal_eval(text or "None")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        return None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_list(value: Any, check: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(check, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and is_text(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_SIDE


def _is_stride(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_STRIDE


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _LARGEST_SIDE


def _is_nms(value: Any) -> bool:
    names = {field.name for field in dataclasses.fields(GraphNms)}
    return isinstance(value, dict) and value.keys() == names and _is_size(value["max_det"]) and all(
        type(value[name]) in (int, float) and 0 <= value[name] <= 1 for name in names - {"max_det"})


_WELL_FORMED = {
    "names": lambda v: _is_list(v, _is_name),
    "strides": lambda v: _is_list(v, _is_stride),
    "max_stride": _is_stride,
    "imgsz": lambda v: _is_list(v, _is_size) and len(v) == 2,
    "dynamic": lambda v: isinstance(v, bool),
    "anchors": lambda v: _is_list(v, lambda level: _is_list(level, _is_side)),
    "precision": lambda v: v in PRECISIONS,
    "source": lambda v: isinstance(v, str),
    "nms": lambda v: v is None or _is_nms(v),
    "float_layers": lambda v: isinstance(v, list) and all(isinstance(layer, str) for layer in v),
}
