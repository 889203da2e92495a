"""Speed of training, data included, against the plain step alone (forward, loss, backward, SGD; eager, NCHW, fp32, default allocator).

    YOLO_DATASETS=../shared/datasets python -m benchmarks.train --cfg yolov5s.yaml --data bccd.yaml --imgsz 320 --batch-size 16
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.interleaved import print_table, report, run_in_turn
from models.spec import load_spec
from models.yolo import DetectionModel
from utils.config import TrainConfig
from utils.cpu import keep_freed_memory
from utils.data.open import open_splits
from utils.data.spec import load_data_spec
from utils.device import compute_dtype, describe, peak_memory_bytes
from utils.errors import script
from utils.hyp import Hyp
from utils.training.fit import Training
from utils.training.loss import DetectionLoss
from utils.training.runs import Run

_CPU = torch.device("cpu")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg", default="yolov5s.yaml")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def plain(args: argparse.Namespace) -> None:
    classes = len(load_data_spec(args.data).names)
    model = DetectionModel(load_spec(args.cfg, classes)).train()
    criterion = DetectionLoss(model.head.anchors, classes, Hyp(), args.imgsz)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    images = torch.rand(args.batch_size, 3, args.imgsz, args.imgsz)
    boxes = torch.rand(args.batch_size * 14, 4) * 0.2 + 0.1
    owner = torch.arange(args.batch_size).repeat_interleave(14)
    targets = torch.cat((owner[:, None], torch.randint(0, classes, (len(owner), 1)), boxes), 1)
    for n in range(5):
        if n == 1:
            start = time.perf_counter()
        criterion(model(images), targets).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    ms = (time.perf_counter() - start) / 4 / args.batch_size * 1e3
    report(ms=ms, images_per_s=1e3 / ms, memory_GB=peak_memory_bytes(_CPU) / 2**30, machine=describe(_CPU, torch.float32))


def whole(args: argparse.Namespace, precision: str) -> None:
    """Two epochs by the engine itself, without validation; the second counts."""
    keep_freed_memory()
    config = TrainConfig(cfg=args.cfg, data=args.data, imgsz=args.imgsz, batch_size=args.batch_size, workers=args.workers, precision=precision,
                         epochs=2, noval=True, nosave=True)
    train_split, val_split = open_splits(config, ("train", "val"))
    model = DetectionModel(load_spec(args.cfg, len(train_split.names)), train_split.names).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(model, Run(config, Hyp(), Path(folder)), train_split, val_split, _CPU)
        rates = [training.train_one_epoch(epoch).images_per_second for epoch in range(2)]
    machine = describe(_CPU, compute_dtype(precision, _CPU))
    report(ms=1e3 / rates[1], images_per_s=rates[1], memory_GB=peak_memory_bytes(_CPU) / 2**30, machine=machine)


@script
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    modes = {"plain": lambda: plain(args), "whole-fp32": lambda: whole(args, "fp32"), "whole-auto": lambda: whole(args, "auto")}
    if args.only:
        modes[args.only]()
        return 0
    passed_on = [item for key in ("cfg", "data", "imgsz", "batch_size", "workers")
                 for item in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    results = run_in_turn("benchmarks.train", list(modes), passed_on, args.repeats)
    print_table(results, ("ms", "images_per_s", "memory_GB"), "ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
