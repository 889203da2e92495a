"""Speed of non-maximum suppression against a plain one (threshold, sort, boxes shifted apart by class, torchvision's nms; image by image), on the
same decoded predictions and on one thread (validate.py gives each of its threads images of its own).

    YOLO_DATASETS=../shared/datasets python -m benchmarks.nms --weights ../shared/weights/yolov5n.pt --data coco128.yaml --task train
    python -m benchmarks.nms        # made-up predictions: crowds of boxes around a few objects, and noise
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from models.yolo import load_model
from utils.boxes import cxcywh_to_xyxy
from utils.config import DataOptions
from utils.cpu import keep_freed_memory
from utils.data.open import open_splits, val_loader
from utils.device import describe
from utils.errors import script
from utils.nms import VALIDATION, NmsOptions, non_max_suppression

_CPU = torch.device("cpu")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="", help="checkpoint whose predictions are suppressed; made-up ones without it")
    parser.add_argument("--data", default="coco128.yaml")
    parser.add_argument("--task", default="train", help="split")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each row in turn; the median counts")
    return parser.parse_args(argv)


@torch.inference_mode()
def real_predictions(weights: str, data: str, task: str, imgsz: int, batch_size: int) -> list[Tensor]:
    model = load_model(weights)
    (split,) = open_splits(DataOptions(data=data), (task,))
    network = model.fused().to(memory_format=torch.channels_last)
    return [network.decode(network(batch.images.float() / 255)) for batch in val_loader(split, imgsz, batch_size, model.pad_stride, 0, _CPU)]


def made_up(batch_size: int, objects: int, noise: float) -> list[Tensor]:
    """(B, 25200, 85): `objects` crowds of likely boxes, all others with objectness up to `noise`."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(batch_size, 25_200, 85, generator=generator)
    p[..., :2] *= 640
    p[..., 2:4] = p[..., 2:4] * 100 + 4
    p[..., 4] *= noise
    p[..., 5:] **= 64  # most classes unlikely
    for n in range(objects):
        crowd = p[:, n * 60 : (n + 1) * 60]
        crowd[..., :4] = crowd[:, :1, :4] + torch.randn(crowd[..., :4].shape, generator=generator)
        crowd[..., 2:4] = crowd[..., 2:4].clamp(min=4)
        crowd[..., 4] = torch.rand(crowd[..., 4].shape, generator=generator)
    return [p]


def plain(predictions: Tensor, options: NmsOptions) -> list[Tensor]:
    found = []
    for image in predictions:
        rows = image[image[:, 4] > options.conf_thres]
        scores = rows[:, 5:] * rows[:, 4:5]
        if options.multi_label:
            row, cls = (scores > options.conf_thres).nonzero(as_tuple=True)
        else:
            row, cls = torch.arange(len(rows)), scores.argmax(1)
            likely = scores[row, cls] > options.conf_thres
            row, cls = row[likely], cls[likely]
        boxes = torch.cat((cxcywh_to_xyxy(rows[row, :4]), scores[row, cls, None], cls[:, None].float()), 1)
        boxes = boxes[boxes[:, 4].argsort(descending=True)[:30_000]]
        found.append(boxes[nms(boxes[:, :4] + boxes[:, 5:] * 7680, boxes[:, 4], options.iou_thres)[: options.max_det]])
    return found


def timed(work: Callable[[Tensor], list[Tensor]], batches: list[Tensor]) -> tuple[float, float, int]:
    """Wall and processor milliseconds an image, and the boxes that remain."""
    wall, cpu = time.perf_counter(), time.process_time()
    boxes = sum(len(found) for batch in batches for found in work(batch))
    images = sum(map(len, batches))
    return (time.perf_counter() - wall) / images * 1e3, (time.process_time() - cpu) / images * 1e3, boxes


@script
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(1)
    if args.weights:
        sets = {args.data: real_predictions(args.weights, args.data, args.task, args.imgsz, args.batch_size)}
    else:
        sets = {"sparse": made_up(args.batch_size, 20, 0.002), "dense": made_up(4, 60, 0.01)}
    print(describe(_CPU, torch.float32))
    print(f"{'predictions':16}{'work':30}{'boxes':>8}{'wall ms/image':>15}{'cpu ms/image':>15}{'of plain':>10}")
    for name, batches in sets.items():
        for what, options in (("validation, conf .001", VALIDATION), ("detection, conf .25", NmsOptions())):
            works = {"plain": lambda p, o=options: plain(p, o), "ours": lambda p, o=options: [non_max_suppression(image, o) for image in p.numpy()]}
            rounds = [{mode: timed(work, batches) for mode, work in works.items()} for _ in range(args.repeats + 1)][1:]  # the first one warms up
            for mode in works:
                wall, cpu, ratio = (sorted(values)[len(values) // 2] for values in zip(
                    *((r[mode][0], r[mode][1], r[mode][0] / r["plain"][0]) for r in rounds), strict=True))
                print(f"{name:16}{f'{what}, {mode}':30}{rounds[0][mode][2]:>8}{wall:15.2f}{cpu:15.2f}{ratio:10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
