"""Speed of detection from video file to annotated video file, in every format, against one stage after another (eager, NCHW, fp32, unfused).

    python export.py --weights yolov5n.pt --include onnx openvino --dynamic
    python quantize.py --weights yolov5n.pt --data coco128.yaml --to openvino --dynamic
    python -m benchmarks.detect --weights yolov5n.pt --video ../shared/media/street.mp4 --images ../shared/datasets/coco128/images/train2017

The files are sought beside the checkpoint; what is missing is left out. Every row is a process of its own, in which each stage also runs alone, all
processors to itself, on some frames of the video (`inference` from pixels to boxes, several images at once as in the pipeline): the slowest of them
is what a pipeline could reach at best. `cores` are those busy on average: a pipeline that keeps all of them busy is capped by the sum of its stages'
work, not by one of them. `work` is that sum, processor time of all stages alone over the processors, and `of_cap` the pipeline's time over the larger
of the two caps. `folder` is the rate of a folder of images, labels written, as a share of inference alone on them. `convolution` is a fixed
workload, as it ran in that process. Cold starts end the table: one image, from the command to its exit.
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from benchmarks.interleaved import print_table, report, run_in_turn
from models.weights import open_weights
from models.yolo import load_model
from utils.cpu import keep_freed_memory, processors
from utils.data.augment import letterbox
from utils.data.sources import Source, open_source
from utils.deploy.pipeline import detect
from utils.deploy.predictor import Predictor
from utils.deploy.results import Result
from utils.deploy.video_writer import VideoWriter
from utils.deploy.writer import Outputs, ResultWriter
from utils.device import describe, peak_memory_bytes
from utils.errors import script
from utils.evaluate.matching import to_detections
from utils.files import ROOT
from utils.measure.timing import reference_convolution
from utils.nms import NmsOptions, non_max_suppression

_CPU = torch.device("cpu")
_STRIDE = 32
_ALONE = 60  # frames held in memory, 6 MB each at 1080p, for the stages that run alone
_KEYS = ("decode", "inference", "draw", "encode", "slowest", "of_slowest", "cores", "work", "of_cap", "folder", "convolution", "memory_GB", "boxes",
         "ms")  # fmt: skip


class Mode(NamedTuple):
    suffix: str  # of the file beside the checkpoint
    precision: str


MODES = {
    "pt fp32": Mode(".pt", "fp32"),
    "pt auto": Mode(".pt", "auto"),
    "ONNX Runtime": Mode(".onnx", "fp32"),
    "ONNX Runtime int8": Mode("_int8.onnx", "fp32"),
    "OpenVINO fp32": Mode("_openvino_model", "fp32"),
    "OpenVINO bf16": Mode("_openvino_model", "bf16"),
    "OpenVINO int8": Mode("_int8_openvino_model", "auto"),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="checkpoint, its exported files beside it")
    parser.add_argument("--video", required=True)
    parser.add_argument("--images", default="", help="folder of images; left out if not named")
    parser.add_argument("--imgsz", type=int, nargs="+", default=[640], help="one number, or height and width")
    parser.add_argument("--frames", type=int, default=0, help="of the video; 0: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def beside(weights: str, mode: Mode) -> Path:
    path = Path(weights)
    return path.with_name(f"{path.stem}{mode.suffix}")


def frames_of(args: argparse.Namespace) -> Source:
    source = open_source(args.video)
    return Source(lambda *_: (frame for frame in islice(source, args.frames))) if args.frames else source


class Cost(NamedTuple):
    """Milliseconds each: by the wall, and of all processors together."""

    wall: float
    cpu: float


def cost_each(work: Callable[[], object], count: int) -> Cost:
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost((time.perf_counter() - start) / count * 1e3, (time.process_time() - cpu) / count * 1e3)


def convolution_ms() -> float:
    run = reference_convolution()
    return statistics.median(cost_each(run, 1).wall for _ in range(20))


# --- the plain loop ------------------------------------------------------------------------------------------------------------------------


def plain(args: argparse.Namespace, out: Path) -> None:
    """One stage after another, on the same functions but for the forward pass; milliseconds of each stage's calls."""
    seconds = dict.fromkeys(("decode", "inference", "draw", "encode"), 0.0)
    model = load_model(args.weights)
    capture = cv2.VideoCapture(args.video)
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    video = cv2.VideoWriter(str(out / "plain.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), capture.get(cv2.CAP_PROP_FPS), size)

    def infer(image: np.ndarray) -> Result:
        padded, geometry = letterbox(image, (args.imgsz[0], args.imgsz[-1]), _STRIDE)
        rgb = torch.from_numpy(cv2.cvtColor(padded, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()
        predictions = model.decode(model(rgb[None].float() / 255))
        return Result(image, to_detections(non_max_suppression(predictions[0].numpy(), NmsOptions()), geometry), model.names)

    def timed(stage: str, call: Callable, *given: object) -> object:
        start = time.perf_counter()
        result = call(*given)
        seconds[stage] += time.perf_counter() - start
        return result

    images = boxes = 0
    start = time.perf_counter()
    with torch.inference_mode():
        while (image := timed("decode", capture.read)[1]) is not None and images != (args.frames or -1):
            result = timed("inference", infer, image)
            timed("encode", video.write, timed("draw", result.plot))
            images, boxes = images + 1, boxes + len(result.found.cls)
    video.release()
    report(ms=(time.perf_counter() - start) / images * 1e3, boxes=boxes, memory_GB=peak_memory_bytes(_CPU) / 2**30, convolution=convolution_ms(),
           machine=describe(_CPU, torch.float32), **{stage: total / images * 1e3 for stage, total in seconds.items()})


# --- ours ----------------------------------------------------------------------------------------------------------------------------------


def whole(args: argparse.Namespace, mode: Mode, out: Path) -> None:
    """The pipeline of detect.py, then each stage alone."""
    keep_freed_memory()
    weights = open_weights(str(beside(args.weights, mode)), "cpu", mode.precision)
    imgsz = weights.fixed or weights.image_size(args.imgsz)
    predictor = Predictor(weights.runner, weights.names, weights.pad_stride, imgsz, NmsOptions())
    infer_all(predictor, first_frames(args, 4))  # compiled, and its memory there
    start, cpu = time.perf_counter(), time.process_time()
    tally = detect(frames_of(args), predictor, ResultWriter(lambda: out, Outputs()))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = peak_memory_bytes(_CPU)  # before what follows holds its frames
    alone = stages_alone(args, predictor, first_frames(args, _ALONE), out)
    pipeline_ms, slowest = wall / tally.images * 1e3, max(cost.wall for cost in alone.values())
    work = sum(cost.cpu for cost in alone.values()) / len(processors())
    folder = {"folder": folder_share(args, predictor, out)} if args.images else {}
    report(ms=pipeline_ms, slowest=slowest, of_slowest=pipeline_ms / slowest, cores=cpu / wall, work=work,
           of_cap=pipeline_ms / max(slowest, work), boxes=tally.boxes, convolution=convolution_ms(),
           memory_GB=memory / 2**30, machine=weights.description,
           **{stage: cost.wall for stage, cost in alone.items()}, **folder)


def first_frames(args: argparse.Namespace, count: int) -> list[np.ndarray]:
    with frames_of(args) as source:
        return [frame.image for frame in islice(source, count)]


def infer_all(predictor: Predictor, images: Iterable[np.ndarray]) -> list[Result]:
    with predictor.runner.threads() as (pool, _):
        return list(pool.map(predictor, images))


def stages_alone(args: argparse.Namespace, predictor: Predictor, held: Sequence[np.ndarray], out: Path) -> dict[str, Cost]:
    """Of a frame."""
    count, (height, width) = len(held), held[0].shape[:2]

    capture = cv2.VideoCapture(args.video)

    def decode() -> None:
        for _ in range(count):
            capture.read()

    def draw() -> None:
        for result in results:  # and kept by nobody, as in the pipeline: fresh memory costs more than the boxes
            result.plot()

    def encode() -> None:
        with VideoWriter(out / "alone.mp4", 25, (width, height)) as video:
            for image in held:
                video.write(image)

    alone = {"decode": cost_each(decode, count), "inference": cost_each(lambda: infer_all(predictor, held), count)}
    results = infer_all(predictor, held)
    return alone | {"draw": cost_each(draw, count), "encode": cost_each(encode, count)}


def folder_share(args: argparse.Namespace, predictor: Predictor, out: Path) -> float:
    """A folder's images a second, labels written, as a share of inference alone on the same images."""
    with open_source(args.images) as source:
        images = [frame.image for frame in source]
    alone = cost_each(lambda: infer_all(predictor, images), len(images)).wall
    tally = detect(open_source(args.images), predictor, ResultWriter(lambda: out, Outputs(images=False, txt=True)))
    return alone / (tally.seconds / tally.images * 1e3)


# --- cold starts ---------------------------------------------------------------------------------------------------------------------------


def cold_starts(args: argparse.Namespace, modes: Sequence[str]) -> Iterator[str]:
    """Seconds of `detect.py` on one image, median and range; the first round, which fills the page cache, does not count."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "frame.jpg"
        with open_source(args.video) as source:
            cv2.imwrite(str(image), next(source).image)
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(args.repeats + 1):
            for mode in modes:
                flags = ["--weights", str(beside(args.weights, MODES[mode])), "--source", str(image), "--project", folder, "--device", "cpu",
                         "--precision", MODES[mode].precision, "--imgsz", *map(str, args.imgsz)]
                start = time.perf_counter()
                subprocess.run([sys.executable, str(ROOT / "detect.py"), *flags], check=True, capture_output=True)
                seconds[mode].append(time.perf_counter() - start)
    for mode, (_, *counted) in seconds.items():
        yield f"{f'cold start, {mode}':34}{statistics.median(counted):10.2f} s{f'{min(counted):.2f} - {max(counted):.2f}':>18}"


@script
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            plain(args, Path(folder)) if args.only == "plain" else whole(args, MODES[args.only], Path(folder))
        return 0
    modes = [name for name in args.modes if beside(args.weights, MODES[name]).exists()]
    for name in args.modes:
        if name not in modes:
            print(f"{name}: no {beside(args.weights, MODES[name])}: left out", file=sys.stderr)
    passed_on = [f"--{key}={getattr(args, key)}" for key in ("weights", "video", "images", "frames")] + ["--imgsz", *map(str, args.imgsz)]
    results = run_in_turn("benchmarks.detect", ["plain", *modes], passed_on, args.repeats)
    print_table(results, _KEYS, "ms")
    for name in modes:
        print(f"{name}: {results[name][0]['machine']}")
    for line in cold_starts(args, modes):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
