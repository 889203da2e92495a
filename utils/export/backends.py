"""An exported file as a network: what a checkpoint's network tells and does, whatever runtime does the work; without PyTorch."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from utils.boxes import Array, xyxy_to_cxcywh
from utils.cpu import cpu_threads, images_at_once
from utils.errors import UserError, short_reason
from utils.export.coreml import MLPACKAGE_SUFFIX, CoremlSession
from utils.export.metadata import KEY, foreign_facts, metadata_from_props, props_from_content, tells_final_boxes
from utils.export.mnn import MNN_SUFFIX, MnnSession
from utils.export.ncnn import NCNN_GRAPH, NCNN_SUFFIX, NcnnSession
from utils.export.sessions import OnnxSession, OpenvinoSession, Session, Shape
from utils.export.tensorrt import ENGINE_SUFFIX, EngineSession
from utils.export.tflite import TFLITE_SUFFIX, TfliteSession
from utils.export.torchscript import TORCHSCRIPT_SUFFIX, TorchscriptSession
from utils.files import ROOT, find_file, is_text, read_yaml

_USUAL_STRIDE = 32  # of a network that doesn't tell
OPENVINO_SUFFIX = "_openvino_model"
_FINAL = "holds final boxes, suppressed in another project's way: export it there without (nms=False, end2end=False)"
_NO_NAMES = ("its metadata tells no class names (key light_yolo, or YOLOv5's names): name them with --data, the YAML that it was trained on, and "
             "with --imgsz its image size, if that is not 640 and the graph takes any")


class ExportedNetwork:
    """A `Runner` (utils/runner.py) and a `Network` (utils/network.py) that takes and gives arrays and tensors on the CPU; several threads may
    share it. Its output is decoded already.

    Attributes:
        at_once: callers that it serves side by side.
        batch: the only number of images that the file takes at once; None: any.
        metadata: None in files of other projects.
        names: of the classes.
        strides: of the levels, pixels; of another project's file the largest alone.
        fixed: (height, width) of the images where it takes no other, else None.
        imgsz: (height, width) that it was made for, where it says so.
        nms: where the file suppresses boxes itself, else None.
        description: runtime, version, precision and threads.
        device: that computes, as PyTorch names it.
    """

    def __init__(self, path: Path, session: Session, names: Callable[[], Sequence[str]] | None = None, at_once: int = 1,
                 device: str = "cpu") -> None:
        """
        Args:
            names: asked where the file itself tells none.

        Raises:
            UserError: it is no such detector, or its metadata is damaged.
        """
        self.path, self._session, self.at_once, self.device = path, session, at_once, device
        batch, height, width = _image_shape(path, session.inputs)
        self.batch = batch
        self.fixed = (height, width) if height and width else None
        self.metadata = metadata_from_props(session.props, str(path))
        if self.metadata:
            self.names, self.max_stride = self.metadata.names, self.metadata.max_stride
        else:
            told, stride = foreign_facts(session.props)
            if tells_final_boxes(session.props):
                raise UserError(f"{path}: {_FINAL}")
            if not told and names is None:
                raise UserError(f"{path}: {_NO_NAMES}")
            self.names, self.max_stride = told or tuple(names()), stride or _USUAL_STRIDE
        self.nms = self.metadata.nms if self.metadata else None
        self.imgsz = self.fixed or (self.metadata.imgsz if self.metadata else None)
        stored = self.metadata.precision if self.metadata else ""
        self.description = f"{session.description}{'' if stored in session.description else f', {stored} file'}"
        self._check_boxes(session.outputs)

    @property
    def pad_stride(self) -> int | None:
        """Images are padded to multiples of it; None: to the whole size."""
        return None if self.fixed else max(self.max_stride, _USUAL_STRIDE)

    def run(self, images: np.ndarray, least: float) -> Sequence[np.ndarray]:
        return list(self(_to_input(images)))

    @contextmanager
    def threads(self) -> Iterator[tuple[ThreadPoolExecutor, int]]:
        pool = ThreadPoolExecutor(self.at_once, "inference")
        try:
            yield pool, self.at_once
        finally:
            pool.shutdown(cancel_futures=True)

    def __call__(self, images: Array) -> Array:
        """(B, 3, H, W) float in 0..1 -> (B, N, 5 + C) float32, of an array an array, of a tensor a tensor.

        A file of a fixed batch size runs as often as that takes.

        Where the file suppresses boxes itself, N is its `max_det`: what it keeps, each with its own class alone, then zeros. Suppressed once more
        they stay what they are, so that who reads them need not know.

        Raises:
            UserError: images of another size than it takes, or a graph that fails on them.
        """
        size = tuple(images.shape[2:])
        if self.fixed and size != self.fixed:
            raise UserError(f"{self.path}: takes images of {_size(self.fixed)} px only, not of {_size(size)}: export it with --dynamic, "
                            f"or with --imgsz {size[0]} {size[1]}")
        if not isinstance(images, np.ndarray):
            import torch  # whoever has a tensor has imported it

            return torch.from_numpy(self(images.numpy(force=True)))
        array = np.ascontiguousarray(images, self._session.dtype)
        step = self.batch or len(array)
        parts = [self._run(array[start : start + step], step) for start in range(0, len(array), step)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.float32, copy=False)

    def decode(self, outputs: Array) -> Array:
        return outputs

    def _run(self, images: np.ndarray, batch: int) -> np.ndarray:
        """At most `batch` images, filled up to as many."""
        count = len(images)
        if count < batch:
            images = np.concatenate((images, np.zeros((batch - count, *images.shape[1:]), images.dtype)))
        try:
            boxes = self._session(images)
        except Exception as error:  # of a kernel: of any kind
            raise UserError(f"{self.path}: fails on images of {_size(images.shape[2:])} px: {short_reason(error)}") from None
        self._check_boxes(boxes.shape)
        if not self.metadata and boxes.shape[2] == 6 and not boxes[..., 5].any():  # of one class, probabilities that are all 0: they are its number
            raise UserError(f"{self.path}: {_FINAL}")
        return spread(boxes[:count], len(self.names)) if self.nms else boxes[:count]

    def _check_boxes(self, shape: Shape | None) -> None:
        columns = 6 if self.nms else 5 + len(self.names)
        if shape is None or len(shape) != 3 or shape[2] not in (None, columns):
            found = "?" if shape is None else " x ".join("any" if side is None else str(side) for side in shape)
            raise UserError(f"{self.path}: its output is {found}, where a YOLOv5-like detector of its {len(self.names)} classes has "
                            f"images x boxes x {columns}: is it another kind of network, or --data of other classes?")


def spread(final: np.ndarray, classes: int) -> np.ndarray:
    """Final boxes (B, N, 6) of x1, y1, x2, y2, confidence, class -> (B, N, 5 + C), as a graph without suppression has them."""
    numbers = np.arange(classes, dtype=final.dtype)
    return np.concatenate((xyxy_to_cxcywh(final[..., :4]), final[..., 4:5], final[..., 5:6] == numbers), -1, dtype=final.dtype)


def open_network(
    path: str | Path, *, bf16: bool = False, names: Callable[[], Sequence[str]] | None = None, at_once: int | None = None, device: str = ""
) -> ExportedNetwork:
    """The network of an exported file or folder (`find_exported`) in its own runtime: on the CPU, of an engine on a CUDA device.

    Args:
        bf16: compute in bf16 where the runtime can (OpenVINO); ONNX Runtime and TorchScript compute in what the file holds.
        names: gives the classes of a file that tells none.
        at_once: callers that will run images side by side; `images_at_once` where None.
        device: of an engine, as PyTorch names it; "": its current CUDA device.

    Raises:
        UserError: no such file, its runtime is not installed, or it is no whole detector.
    """
    found = find_exported(path)
    if not is_text(str(found)):
        raise UserError(f"{found}: runtimes open no file whose name is no UTF-8: rename it")
    threads = cpu_threads()
    at_once = min(at_once or images_at_once(threads), threads)
    if found.suffix == ".onnx":
        return ExportedNetwork(found, OnnxSession(found, threads, at_once), names, at_once)
    if found.suffix == TORCHSCRIPT_SUFFIX:
        return ExportedNetwork(found, TorchscriptSession(found, threads), names, at_once)
    if found.suffix == TFLITE_SUFFIX:
        return ExportedNetwork(found, TfliteSession(found, threads, at_once), names, at_once)
    if found.suffix == MLPACKAGE_SUFFIX:
        return ExportedNetwork(found, CoremlSession(found), names)
    if found.suffix == ENGINE_SUFFIX:
        session = EngineSession(found, device)
        return ExportedNetwork(found, session, names, device=session.device)
    if found.suffix == MNN_SUFFIX:
        return ExportedNetwork(found, MnnSession(found, threads), names)
    if found.name.endswith(NCNN_GRAPH):
        return ExportedNetwork(found, NcnnSession(found, threads, at_once), names, at_once)
    session = OpenvinoSession(found, threads, at_once, bf16)
    if KEY not in session.props:
        session.props = _beside(found) | session.props
    return ExportedNetwork(found, session, names, at_once)


def _to_input(images: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in 0..1."""
    planes = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
    for image, out in zip(images, planes, strict=True):
        for channel, plane in zip(cv2.split(image), out, strict=True):  # half the time of a strided copy
            np.divide(channel, np.float32(255), out=plane)
    return planes


def is_exported(path: str | Path) -> bool:
    """By its name alone: whether `open_network` is the one to ask."""
    path = Path(path)
    files = ".onnx", ".xml", TORCHSCRIPT_SUFFIX, TFLITE_SUFFIX, MNN_SUFFIX, ENGINE_SUFFIX, NCNN_GRAPH
    return path.name.endswith((*files, OPENVINO_SUFFIX, NCNN_SUFFIX, MLPACKAGE_SUFFIX))


def needs_torch(path: str | Path) -> bool:
    """By its name alone: whether an exported file can't be run without PyTorch, which runs it or has the memory of its device."""
    return Path(path).suffix == TORCHSCRIPT_SUFFIX or needs_gpu(path)


def needs_gpu(path: str | Path) -> bool:
    """By its name alone: whether an exported file runs on a CUDA device; all others run on the CPU."""
    return Path(path).suffix == ENGINE_SUFFIX


def find_exported(path: str | Path) -> Path:
    """The file itself, or the .mlpackage folder; of another folder the .xml or .ncnn.param file in it.

    Raises:
        UserError: there is none.
    """
    path = Path(path).expanduser()
    folder = next((folder for folder in (path, ROOT / path) if folder.is_dir()), None)
    if folder is None:
        return find_file(path, [ROOT], "exported network (exported by export.py)")
    if folder.suffix == MLPACKAGE_SUFFIX:
        return folder
    inside = sorted(path for ending in (".xml", NCNN_GRAPH) for path in folder.glob(f"*{ending}"))
    if len(inside) != 1:
        raise UserError(f"{folder}: holds {len(inside) or 'no'} .xml files (OpenVINO) or {NCNN_GRAPH} ones, where an exported model has one: "
                        "name the file itself, or export again")
    return inside[0]


def _beside(xml: Path) -> dict[str, str]:
    """What can be told from the YAML that YOLOv5 writes beside its OpenVINO models."""
    files = sorted(xml.parent.glob("*.yaml"))
    content = read_yaml(files[0]) if len(files) == 1 else {}
    return props_from_content(content)


def _image_shape(path: Path, shape: Shape | None) -> tuple[int | None, int | None, int | None]:
    """Batch, height and width of the graph's input, None where any will do."""
    if shape is None or len(shape) != 4 or shape[1] != 3 or (shape[2] is None) != (shape[3] is None):
        raise UserError(f"{path}: does not take one batch of images x 3 x height x width: it is another kind of network")
    return shape[0], shape[2], shape[3]


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
