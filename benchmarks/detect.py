"""Speed of detection from video file to annotated video file, against one stage after another (eager, NCHW, fp32, unfused, default allocator).

    python -m benchmarks.detect --weights ../shared/weights/yolov5n.pt --video ../shared/media/street.mp4

Each stage's milliseconds are those spent in its calls: they overlap in our pipeline, whose `inference` is of one image while others are under way.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch

from benchmarks.interleaved import print_table, report, run_in_turn
from models.yolo import load_model
from utils.cpu import keep_freed_memory
from utils.data.augment import letterbox
from utils.data.sources import open_source
from utils.deploy.pipeline import detect
from utils.deploy.predictor import Predictor
from utils.deploy.results import Result
from utils.deploy.writer import Outputs, ResultWriter
from utils.device import compute_dtype, describe, peak_memory_bytes
from utils.evaluate.matching import Detections
from utils.network import TorchRunner
from utils.nms import NmsOptions, non_max_suppression

_CPU = torch.device("cpu")
_STRIDE = 32


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--video", required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Clock:
    """Milliseconds spent in each stage's calls."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = defaultdict(float)

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            self.ms[stage] += (time.perf_counter() - start) * 1e3
            return result

        return wrapped

    def watched(self, cls: type, method: str, stage: str) -> type:
        """Makes objects of `cls` with one timed method; not a subclass, for Python crashes at its end where OpenCV's classes have one."""

        class Watched:
            def __init__(watched, *args: Any) -> None:
                watched.inner = cls(*args)
                setattr(watched, method, self.timed(stage, getattr(watched.inner, method)))

            def __getattr__(watched, name: str) -> Any:
                return getattr(watched.inner, name)

        return Watched

    def report(self, seconds: float, images: int, boxes: int, dtype: torch.dtype) -> None:
        report(ms=seconds / images * 1e3, images_per_s=images / seconds, boxes=boxes, memory_GB=peak_memory_bytes(_CPU) / 2**30,
               machine=describe(_CPU, dtype), **{stage: ms / images for stage, ms in self.ms.items()})


def plain(args: argparse.Namespace, out: Path) -> None:
    """One stage after another, on the same functions but for the forward pass."""
    clock = Clock()
    model = load_model(args.weights)
    start = time.perf_counter()
    capture = cv2.VideoCapture(args.video)
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    video = cv2.VideoWriter(str(out / "plain.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), capture.get(cv2.CAP_PROP_FPS), size)

    def infer(image: Any) -> tuple[torch.Tensor, Any]:
        padded, geometry = letterbox(image, (args.imgsz, args.imgsz), _STRIDE)
        rgb = torch.from_numpy(cv2.cvtColor(padded, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()
        return model.decode(model(rgb[None].float() / 255)), geometry

    def suppress(predictions: torch.Tensor, geometry: Any) -> Detections:
        found = non_max_suppression(predictions[0].numpy(), NmsOptions())
        return Detections(geometry.back(found[:, :4]), found[:, 4], found[:, 5].astype(int))

    decode, infer, suppress = clock.timed("decode", capture.read), clock.timed("inference", infer), clock.timed("NMS", suppress)
    draw, encode = clock.timed("draw", Result.drawn), clock.timed("encode", video.write)
    images = boxes = 0
    with torch.inference_mode():
        while (image := decode()[1]) is not None:
            found = suppress(*infer(image))
            encode(draw(Result(image, found, model.names)))
            images, boxes = images + 1, boxes + len(found.cls)
    video.release()
    clock.report(time.perf_counter() - start, images, boxes, torch.float32)


def whole(args: argparse.Namespace, out: Path, precision: str) -> None:
    """The pipeline of detect.py; OpenCV's calls and the drawing are wrapped to time them."""
    keep_freed_memory()
    clock = Clock()

    cv2.VideoCapture = clock.watched(cv2.VideoCapture, "read", "decode")
    cv2.VideoWriter = clock.watched(cv2.VideoWriter, "write", "encode")
    Result.drawn = clock.timed("draw", Result.drawn)
    dtype = compute_dtype(precision, _CPU)
    model = load_model(args.weights)
    network = model.fused().to(memory_format=torch.channels_last)
    predictor = Predictor(TorchRunner(network, _CPU, dtype), model.names, _STRIDE, (args.imgsz, args.imgsz), NmsOptions())
    tally = detect(open_source(args.video), predictor, ResultWriter(lambda: out, Outputs()))
    clock.ms |= {"inference": tally.inference_ms, "NMS": tally.nms_ms}
    clock.report(tally.seconds, tally.images, tally.boxes, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    modes = {"plain": lambda out: plain(args, out),
             "whole-fp32": lambda out: whole(args, out, "fp32"),
             "whole-auto": lambda out: whole(args, out, "auto")}
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            modes[args.only](Path(folder))
        return 0
    passed_on = [item for key in ("weights", "video", "imgsz") for item in (f"--{key}", str(getattr(args, key)))]
    results = run_in_turn("benchmarks.detect", list(modes), passed_on, args.repeats)
    print_table(results, ("decode", "inference", "NMS", "draw", "encode", "boxes", "memory_GB", "images_per_s", "ms"), "ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
