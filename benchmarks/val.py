"""Speed of validation, the whole pipeline from file to mAP, against the plain forward pass alone (eager, NCHW, fp32, default allocator).

    YOLO_DATASETS=../shared/datasets python -m benchmarks.val --weights ../shared/weights/yolov5n.pt --data coco128.yaml --task train
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.interleaved import print_table, report, run_in_turn
from models.yolo import load_model
from utils.config import DataOptions
from utils.cpu import keep_freed_memory
from utils.data.open import open_splits, val_loader
from utils.device import compute_dtype, describe, peak_memory_bytes
from utils.errors import script
from utils.evaluate.validate import validate

_CPU = torch.device("cpu")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="coco128.yaml")
    parser.add_argument("--task", default="train", help="split")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def plain(args: argparse.Namespace) -> None:
    """The forward pass alone, on square batches."""
    model = load_model(args.weights)
    images = torch.rand(args.batch_size, 3, args.imgsz, args.imgsz)
    with torch.inference_mode():
        model(images)
        start = time.perf_counter()
        for _ in range(4):
            model(images)
    ms = (time.perf_counter() - start) / 4 / args.batch_size * 1e3
    report(ms=ms, memory_GB=peak_memory_bytes(_CPU) / 2**30, machine=describe(_CPU, torch.float32))


def whole(args: argparse.Namespace, precision: str) -> None:
    """Files to mAP: reading, letterbox, forward, NMS, scoring; the second pass counts, when the page cache and the allocator are warm."""
    keep_freed_memory()
    dtype = compute_dtype(precision, _CPU)
    model = load_model(args.weights)
    (split,) = open_splits(DataOptions(data=args.data), (args.task,))
    network = model.fused().to(memory_format=torch.channels_last)
    for _ in range(2):
        start = time.perf_counter()
        loader = val_loader(split, args.imgsz, args.batch_size, model.pad_stride, args.workers, _CPU)
        result = validate(network, loader, split, _CPU, dtype)
        ms = (time.perf_counter() - start) / len(result.indices) * 1e3
    speed = result.speed
    report(ms=ms, load_ms=speed.load, forward_ms=speed.inference, nms_ms=speed.nms, memory_GB=peak_memory_bytes(_CPU) / 2**30,
           machine=describe(_CPU, dtype))


@script
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    modes = {"plain": lambda: plain(args), "whole-fp32": lambda: whole(args, "fp32"), "whole-auto": lambda: whole(args, "auto")}
    if args.only:
        modes[args.only]()
        return 0
    passed_on = [item for key in ("weights", "data", "task", "imgsz", "batch_size", "workers")
                 for item in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    results = run_in_turn("benchmarks.val", list(modes), passed_on, args.repeats)
    print_table(results, ("ms", "load_ms", "forward_ms", "nms_ms", "memory_GB"), "ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
