"""Every network YAML as a user meets it: takes images of any shape, learns a batch by heart, is saved and read back the same."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.spec import load_spec
from models.yolo import DetectionModel, load_model
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.hyp import Hyp
from utils.training.loss import DetectionLoss
from utils.training.optim import build_optimizer

FILES = sorted(Path(__file__).resolve().parents[1].glob("models/**/*.yaml"))
LIGHT = ["yolov5n", "yolov5n-ghost", "yolov5s-shuffle", "yolov5n-mobilenetv3-small", "yolov5s-timm-mobilenetv4"]
CLASSES, PIXELS, STEPS = ("red", "green", "blue"), 128, 20


def learn(model: DetectionModel) -> list[float]:
    """The loss at each of 20 steps on one batch of two images with two boxes each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, PIXELS, PIXELS, generator=generator).contiguous(memory_format=torch.channels_last)
    targets = torch.tensor([[0, 0, 0.3, 0.3, 0.2, 0.3], [0, 1, 0.7, 0.6, 0.5, 0.4], [1, 2, 0.5, 0.5, 0.9, 0.8], [1, 0, 0.2, 0.8, 0.1, 0.1]])
    criterion = DetectionLoss(model.head.anchors, len(CLASSES), Hyp(), PIXELS)
    optimizer = build_optimizer(model, "AdamW", Hyp(lr0=0.001), len(images))
    losses = []
    for _ in range(STEPS):
        loss = criterion(model(images), targets).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def check(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = DetectionModel(load_spec(f"{name}.yaml", len(CLASSES)), CLASSES).to(memory_format=torch.channels_last)
    losses = learn(model.train())
    assert min(losses[-3:]) < 0.8 * losses[0], losses

    save_checkpoint(folder / "net.pt", Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict())))
    loaded = load_model(str(folder / "net.pt"))
    model.eval()
    for height, width in ((320, 320), (416, 256)):
        images = torch.rand(1, 3, model.whole_strides(height), model.whole_strides(width))
        with torch.no_grad():
            mine, theirs = model(images), loaded(images)
        for stride, a, b in zip(model.strides, mine, theirs, strict=True):
            assert a.shape == (1, model.head.num_anchors, images.shape[2] // stride, images.shape[3] // stride, 5 + len(CLASSES))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LIGHT)
def test_light_networks(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in LIGHT], ids=lambda path: path.stem)
def test_every_network(path: Path, tmp_path: Path) -> None:
    check(path.stem, tmp_path)
