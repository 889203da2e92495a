"""A network, a data set and a training so small that an epoch takes a fraction of a second."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from torch import nn
from transplant import lived_in

from models.detector import Detector
from models.spec import load_spec
from models.yolo import DetectionModel
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.data.labels import ScanReport, Split

NAMES = ("red", "green")
_COLOURS = ((40, 40, 220), (40, 200, 40))  # BGR, one for each class
ANCHORS = [[10, 10, 16, 16, 24, 24], [20, 30, 30, 20, 30, 30], [40, 40, 50, 30, 30, 50]]
_LEVEL_ROWS = {1: [2], 2: [2, 3], 3: [2, 3, 4], 4: [1, 2, 3, 4], 5: [1, 2, 3, 4, 5]}  # of the strides 4, 8, 16, 32, 64


def model_yaml(folder: Path, *, name: str = "tiny.yaml", levels: int = 3, width: int = 8, anchors: int | list = 0, dropout: float = 0) -> Path:
    """Plain convolutions down to the levels' strides, dropout on the last if asked for, and the head."""
    sources = list(_LEVEL_ROWS[levels])
    rows = [[-1, 1, "Conv", [width, 3, 2]] for _ in range(sources[-1] + 1)]
    if dropout:
        rows.append([-1, 1, "nn.Dropout", [dropout]])
        sources[-1] += 1
    anchors = anchors or [ANCHORS[min(n, 2)] for n in range(levels)]
    content = {"nc": len(NAMES), "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": anchors, "backbone": rows,
               "head": [[sources, 1, "Detect", ["nc", "anchors"]]]}
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


def tiny_model(folder: Path, names: tuple[str, ...] = NAMES, seed: int = 0, **spec: int | list) -> DetectionModel:
    torch.manual_seed(seed)
    return DetectionModel(load_spec(str(model_yaml(folder, **spec)), len(names)), names)


def lively(model: DetectionModel) -> DetectionModel:
    """Fused, with boxes of every confidence that depend on the image, though nobody trained it."""
    model = lived_in(model).eval().fused().requires_grad_(False)
    noise = torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(1))
    maps = model(nn.functional.interpolate(noise, scale_factor=8))  # in patches, as pictures are
    for conv, raw in zip(model.head.m, maps, strict=True):
        nn.init.zeros_(conv.bias)
        conv.weight *= 0.5 / raw.std((0, 2, 3), keepdim=True).mean()
    return model


def lively_checkpoint(folder: Path) -> Path:
    """folder/tiny.pt, for images of 64 px: a network as `lively` makes it."""
    model = tiny_model(folder)
    for conv, better in zip(model.head.m, lively(model).head.m, strict=True):
        conv.load_state_dict(better.state_dict())
    path = folder / "tiny.pt"
    save_checkpoint(path, Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict()), imgsz=64))
    return path


def picture(rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) grey noise with one or two coloured boxes, and their (n, 5) class, cx, cy, w, h, normalised."""
    image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    rows = []
    for _ in range(rng.integers(1, 3)):
        cls, (w, h) = int(rng.integers(2)), np.minimum(rng.integers(14, 30, 2), (width, height))
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        image[y : y + h, x : x + w] = _COLOURS[cls]
        rows.append((cls, (x + w / 2) / width, (y + h / 2) / height, w / width, h / height))
    return image, np.array(rows, np.float32)


def data_yaml(folder: Path, train: int = 6, val: int = 4, side: int = 64) -> Path:
    """A YOLO data set of PNG files, every third one wider, every third one taller."""
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("val", val), ("test", val)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for n in range(count):
            width, height = ((side, side), (side, side * 3 // 4), (side * 3 // 4, side))[n % 3]
            image, rows = picture(rng, width, height)
            cv2.imwrite(str(folder / "images" / split / f"{n:02d}.png"), image)
            lines = [f"{int(c)} " + " ".join(f"{v:.6f}" for v in box) for c, *box in rows]
            (folder / "labels" / split / f"{n:02d}.txt").write_text("\n".join(lines) + "\n")
    path = folder / "tiny_data.yaml"
    path.write_text(yaml.safe_dump({"path": ".", "train": "images/train", "val": "images/val", "test": "images/test", "names": list(NAMES)}))
    return path


def label_by(weights: Path, images: Path, conf: float = 0.3) -> None:
    """New labels for a folder of images: what this checkpoint finds in each, so that its mAP there is not that of a network that nobody trained."""
    detector = Detector(weights, "cpu", "fp32")
    for path in images.iterdir():
        (result,) = detector(path, conf=conf)
        height, width = result.image.shape[:2]
        boxes = [" ".join(f"{v:.6f}" for v in (*((a + b) / 2), *(b - a)))
                 for a, b in result.xyxy.reshape(-1, 2, 2) / (width, height)]
        lines = [f"{int(c)} {box}\n" for c, box in zip(result.cls, boxes, strict=True)]
        (images.parents[1] / "labels" / images.name / f"{path.stem}.txt").write_text("".join(lines))


def make_split(images: list[str], sizes: list[tuple[int, int]], boxes: list[np.ndarray], names: tuple[str, ...] = NAMES) -> Split:
    """A verified split by hand; `boxes` are (n, 5) class, cx, cy, w, h, normalised."""
    own = tuple(np.asarray(b, np.float32).reshape(-1, 5) for b in boxes)
    nothing = tuple(np.zeros((0, 5), np.float32) for _ in images)
    report = ScanReport(len(images), sum(map(len, own)), 0, 0, 0, 0, 0, 0, 0, 0, ())
    return Split(names, tuple(images), np.array(sizes, np.int32).reshape(-1, 2), own, nothing, None, None, tuple(range(len(images))),
                 tuple(range(len(names))), report, "by hand")


def picture_split(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> Split:
    """Pictures written as PNG and their labels as a split."""
    rng = np.random.default_rng(seed)
    paths, boxes = [], []
    for n, (width, height) in enumerate(sizes):
        image, rows = picture(rng, width, height)
        paths.append(str(folder / f"{n:02d}.png"))
        cv2.imwrite(paths[-1], image)
        boxes.append(rows)
    return make_split(paths, sizes, boxes)


def train_flags(folder: Path, **data: int) -> list[str]:
    """The command line of a training of two epochs on the CPU, in `folder`; its runs lie in `folder`/runs."""
    cfg, yaml_file = model_yaml(folder), data_yaml(folder, **data)
    return ["--cfg", str(cfg), "--data", str(yaml_file), "--imgsz", "64", "--epochs", "2", "--batch-size", "4", "--device", "cpu",
            "--precision", "fp32", "--workers", "0", "--noplots", "--project", str(folder / "runs")]
