"""ncnn models: a folder of graph, weights and the YAML that says what they are; run by ncnn's Python package."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import UserError
from utils.export.metadata import KEY, metadata_from_props, props_from_content
from utils.export.sessions import Shape
from utils.extras import import_extra
from utils.files import read_yaml, write_yaml
from utils.log import no_output

if TYPE_CHECKING:
    from utils.export.metadata import ExportMetadata

NCNN_SUFFIX = "_ncnn_model"
NCNN_FILES = NCNN_GRAPH, _WEIGHTS = ".ncnn.param", ".ncnn.bin"
_METADATA = "metadata.yaml"
_INPUT, _OUTPUT = "in0", "out0"  # as pnnx names them


def write_ncnn_metadata(folder: Path, metadata: ExportMetadata) -> None:
    """Beside the model."""
    write_yaml(folder / _METADATA, metadata.to_content())


class NcnnSession:
    """An ncnn model on the CPU, one image at a time in its caller's thread, which has its share of the threads: ncnn keeps a team for each caller.

    Args:
        path: the .ncnn.param; weights and metadata.yaml lie beside it.
    """

    def __init__(self, path: Path, threads: int, at_once: int) -> None:
        ncnn = self._ncnn = import_extra("ncnn")
        weights = path.with_name(path.name.removesuffix(NCNN_GRAPH) + _WEIGHTS)
        if not weights.is_file():
            raise UserError(f"{path}: its weights {weights.name} are missing: keep the two files together")
        content = _beside(path)
        self.props = props_from_content(content)
        metadata = metadata_from_props(self.props, str(path.with_name(_METADATA)))
        precision = metadata.precision if metadata else "fp32"
        self.inputs, self.outputs = _shape(path, content), (None, None, None)
        if metadata and metadata.imgsz != self.inputs[2:]:  # ncnn itself would compute on, outside of its memory
            raise UserError(f"{path.with_name(_METADATA)}: its imgsz and that in its {KEY} differ: it was edited, or is of another export; the graph "
                            "holds one size: export again")
        self.dtype = np.dtype(np.float32)
        self._net = ncnn.Net()
        self._net.opt.num_threads = max(threads // at_once, 1)
        if precision == "fp32":
            for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage"):
                setattr(self._net.opt, option, False)
        with no_output(2):
            failed = self._net.load_param(str(path)) or self._net.load_model(str(weights))
        if failed or _INPUT not in self._net.input_names() or _OUTPUT not in self._net.output_names():
            raise UserError(f"{path}: ncnn can't load it, it or {weights.name} may be cut off or no ncnn model of pnnx")
        self.description = f"ncnn {ncnn.__version__}, {'fp32, ' * (precision == 'fp32')}{threads} threads"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.stack([self._run(image) for image in images])

    def _run(self, image: np.ndarray) -> np.ndarray:
        extractor = self._net.create_extractor()
        extractor.input(_INPUT, self._ncnn.Mat(image).clone())  # the copy is laid out as its kernels want it
        failed, boxes = extractor.extract(_OUTPUT)
        if failed:
            raise RuntimeError(f"ncnn gives no {_OUTPUT}")
        return np.array(boxes)


def _beside(path: Path) -> dict[str, Any]:
    file = path.with_name(_METADATA)
    if not file.is_file():
        raise UserError(f"{path}: {_METADATA} is missing beside it, which tells class names, stride and image size (names, stride, imgsz): "
                        "bring it back, or export again")
    return read_yaml(file)


def _shape(path: Path, content: dict[str, Any]) -> Shape:
    """One image of the size that its graph holds; the graph itself does not say it."""
    imgsz = content.get("imgsz")
    if not (isinstance(imgsz, list) and len(imgsz) == 2 and all(type(side) is int and 0 < side <= 1 << 16 for side in imgsz)):
        raise UserError(f"{path.with_name(_METADATA)}: its imgsz is no [height, width] in pixels: export again")
    return (1, 3, *imgsz)
