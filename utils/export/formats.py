"""What a network can be exported to: for each format its packages, its file's name and its writer. A new format is a new row."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from utils.errors import UserError
from utils.export.backends import OPENVINO_SUFFIX
from utils.export.converters import to_coreml, to_mnn, to_ncnn, to_onnx, to_openvino, to_tflite, to_torchscript
from utils.export.coreml import MLPACKAGE_SUFFIX, RUNS_HERE
from utils.export.graph import Detector, InferenceGraph
from utils.export.metadata import ExportMetadata, stamp_onnx, stamp_openvino
from utils.export.mnn import MNN_SUFFIX
from utils.export.ncnn import NCNN_FILES, NCNN_SUFFIX, write_ncnn_metadata
from utils.export.suppression import suppress_in_onnx, suppress_in_openvino
from utils.export.tensorrt import ENGINE_SUFFIX, build_engine
from utils.export.tflite import TFLITE_SUFFIX
from utils.export.torchscript import TORCHSCRIPT_SUFFIX
from utils.export.trailer import append_trailer
from utils.extras import import_extra, pip_install
from utils.files import did_you_mean
from utils.log import info, warn


@dataclass(frozen=True)
class ExportJob:
    """What to export, and how.

    Attributes:
        network: fused, float32, on the CPU.
        opset: of ONNX; None leaves it to PyTorch.
        simplify: let onnxslim fold and merge what an ONNX graph computes needlessly.
    """

    network: Detector
    metadata: ExportMetadata
    batch_size: int = 1
    opset: int | None = None
    simplify: bool = False

    @property
    def half(self) -> bool:
        return self.metadata.precision == "fp16"

    def example(self) -> torch.Tensor:
        """Images to trace with."""
        return torch.zeros(self.batch_size, 3, *self.metadata.imgsz)


@dataclass(frozen=True)
class Format:
    """Attributes:
    packages: that write and check it.
    suffix: of its file's name, after that of the checkpoint.
    is_folder: of several files.
    write: makes the file, or the files in a folder that is there; None where it isn't written here.
    suppresses: can hold non-maximum suppression in its graph.
    advice: how to install its packages.
    needs_gpu: to write and to run it.
    static: what holds one image size, of a format that can't be dynamic.
    elsewhere: why it is not written here, or can't run and so not prove itself, and the way there.
    """

    name: str
    packages: tuple[str, ...]
    suffix: str
    is_folder: bool
    write: Callable[[ExportJob, Path], None] | None
    suppresses: bool = False
    advice: str = ""
    needs_gpu: bool = False
    static: str = ""
    elsewhere: str = ""

    @property
    def by_onnx(self) -> bool:
        """Is an ONNX file, or is made of one: --opset and --simplify are its own too."""
        return "onnx" in self.packages

    def missing(self, job: ExportJob | None = None) -> str | None:
        """Which pip install it lacks, or why it can't be written so or here; None where all is there.

        Args:
            job: what it is to write, which may need a package more.
        """
        if job and job.metadata.dynamic and self.static:
            return f"{self.static} holds one image size: leave out --dynamic"
        if self.write is None:
            return f"not written here: {self.elsewhere}"
        if self.needs_gpu and not torch.cuda.is_available():
            return ("not written here: it is built on the NVIDIA GPU that it is for: repeat the command there, or export onnx, and there "
                    "trtexec --onnx=best.onnx --saveEngine=best.engine")
        more = {"onnx": job and job.metadata.nms and self.suppresses, "onnxslim": job and job.simplify and self.by_onnx}
        command = pip_install(dict.fromkeys((*self.packages, *(package for package, needed in more.items() if needed))))
        return command and f"{command}{self.advice}"


def write_onnx(job: ExportJob, path: Path) -> None:
    _write_bare_onnx(job, path, job.half)
    stamp_onnx(path, job.metadata)


def _write_bare_onnx(job: ExportJob, path: Path, half: bool = False) -> None:
    graph = InferenceGraph(job.network, half=half)
    to_onnx(graph, job.example(), path, dynamic=job.metadata.dynamic, opset=job.opset)
    if job.metadata.nms:
        suppress_in_onnx(path, len(job.metadata.names), job.metadata.nms)
    if job.simplify:
        onnx = import_extra("onnx")
        onnx.save(import_extra("onnxslim").slim(onnx.load(str(path))), str(path))


def write_engine(job: ExportJob, path: Path) -> None:
    with TemporaryDirectory() as folder:
        onnx_path = Path(folder) / "network.onnx"
        write_onnx(job, onnx_path)
        info("engine: TensorRT times its kernels on this GPU, which takes minutes")
        build_engine(onnx_path, path)
    append_trailer(path, job.metadata)


def write_openvino(job: ExportJob, folder: Path) -> None:
    """With half, the weights are stored in fp16 and the processor computes as it does best."""
    model = to_openvino(InferenceGraph(job.network), job.example(), dynamic=job.metadata.dynamic)
    if job.metadata.nms:
        model = suppress_in_openvino(model, len(job.metadata.names), job.metadata.nms)
    stamp_openvino(model, job.metadata)
    import_extra("openvino").save_model(model, folder / f"{Path(job.metadata.source).stem}.xml", compress_to_fp16=job.half)


def write_ncnn(job: ExportJob, folder: Path) -> None:
    _tell_batch(job, "an ncnn graph")
    stem = folder / Path(job.metadata.source).stem
    to_ncnn(InferenceGraph(job.network), job.example()[:1], *(Path(f"{stem}{ending}") for ending in NCNN_FILES), half=job.half)
    write_ncnn_metadata(folder, job.metadata)


def write_mnn(job: ExportJob, path: Path) -> None:
    with TemporaryDirectory() as folder:
        onnx_path = Path(folder) / "network.onnx"
        _write_bare_onnx(job, onnx_path)
        to_mnn(onnx_path, path, json.dumps(job.metadata.to_content()), half=job.half)


def write_torchscript(job: ExportJob, path: Path) -> None:
    to_torchscript(InferenceGraph(job.network, half=job.half), job.example(), path, job.metadata)


def write_tflite(job: ExportJob, path: Path) -> None:
    to_tflite(InferenceGraph(job.network), job.example(), path, half=job.half)
    append_trailer(path, job.metadata)


def write_coreml(job: ExportJob, folder: Path) -> None:
    _tell_batch(job, "a Core ML graph")
    to_coreml(InferenceGraph(job.network, half=job.half), job.example()[:1], folder, job.metadata.to_props())


def _tell_batch(job: ExportJob, what: str) -> None:
    if job.batch_size > 1:
        warn(f"--batch-size {job.batch_size}: {what} takes one image at a time: batches run one by one")


FORMATS = {
    format.name: format
    for format in (
        Format("onnx", ("onnx", "onnxruntime"), ".onnx", False, write_onnx, suppresses=True),
        Format("openvino", ("openvino",), OPENVINO_SUFFIX, True, write_openvino, suppresses=True),
        Format("ncnn", ("ncnn", "pnnx"), NCNN_SUFFIX, True, write_ncnn, static="an ncnn graph"),
        Format("torchscript", (), TORCHSCRIPT_SUFFIX, False, write_torchscript),
        Format("tflite", ("litert_torch", "ai_edge_litert"), TFLITE_SUFFIX, False, write_tflite, static="a TFLite graph",
               advice=" beside requirements.txt in an environment of its own, as it wants an older PyTorch, and export there"),
        Format("mnn", ("MNN", "onnx"), MNN_SUFFIX, False, write_mnn),
        Format("coreml", ("coremltools",), MLPACKAGE_SUFFIX, True, write_coreml, static="a Core ML graph",
               elsewhere="" if RUNS_HERE else "Core ML runs, and so the file can prove itself, on a Mac only: repeat the command there"),
        Format("engine", ("tensorrt", "onnx"), ENGINE_SUFFIX, False, write_engine, needs_gpu=True, static="a TensorRT engine",
               advice=" (tensorrt-cu12 in tensorrt's place where the driver knows CUDA 12 at most)"),
    )
}


_ELSEWHERE = {  # formats whose tools or runtimes don't fit beside PyTorch here, and the way there from a file that proved itself
    **dict.fromkeys(("saved_model", "pb", "tfjs"), "export onnx, and convert that with onnx2tf, in an environment with TensorFlow"),
    "edgetpu": "Coral's edgetpu_compiler takes int8 TFLite files: export onnx, and there onnx2tf -i best.onnx -oiqt",
    "executorch": "its exporter wants an environment with a PyTorch of its own; on phones tflite and ncnn run",
    "paddle": "export onnx, and convert that with X2Paddle, in an environment with PaddlePaddle",
}


def choose_formats(asked: Sequence[str]) -> list[Format]:
    """The formats of these names, each once; one that is not written here says so when it is.

    Raises:
        UserError: no such format.
    """
    known = FORMATS | {name: Format(name, (), f".{name}", False, None, elsewhere=reason) for name, reason in _ELSEWHERE.items()}
    asked = [name for text in asked for name in text.lower().split(",")]
    for name in asked:
        if name not in known:
            raise UserError(f"--include {name}: no such format{did_you_mean(name, known)}; there are {', '.join(FORMATS)}")
    return [known[name] for name in dict.fromkeys(asked)]
