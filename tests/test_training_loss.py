"""The loss: values worked by hand beside their formula, and what must hold of any."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from torchvision.ops import complete_box_iou_loss

from utils.boxes import cxcywh_to_xyxy
from utils.hyp import Hyp
from utils.training.ciou import ciou
from utils.training.loss import DetectionLoss, box_of

HYP = Hyp()
GRIDS = {3: (8, 4, 2), 4: (8, 4, 2, 1), 2: (8, 4), 5: (16, 8, 4, 2, 1)}


def some_maps(levels: int = 3, nc: int = 2, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, side, side, 5 + nc, generator=generator).requires_grad_() for side in GRIDS[levels]]


def some_targets(count: int = 6, nc: int = 2, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 6, generator=generator)
    targets[:, 0], targets[:, 1] = torch.arange(count) % batch, torch.arange(count) % nc
    targets[:, 4:] = targets[:, 4:] * 0.4 + 0.1
    return targets


def one_cell(nc: int = 2, objectness: float = 0.0, **kwargs: float) -> tuple[Tensor, DetectionLoss]:
    """A map of one cell and an anchor of just that size: a raw map of zeros predicts exactly the cell."""
    raw = torch.zeros(1, 1, 1, 1, 5 + nc)
    raw[..., 4] = objectness
    return raw, DetectionLoss(torch.ones(1, 1, 2), nc, HYP, 640, **kwargs)


def test_ciou_equals_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(200, 4, generator=generator) * torch.tensor([2, 2, 3, 3]) + 0.05 for _ in range(2))
    a.requires_grad_()
    mine, theirs = 1 - ciou(a, b), complete_box_iou_loss(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for gradient, expected in zip(torch.autograd.grad(mine.sum(), a), torch.autograd.grad(theirs.sum(), a), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_box_of_by_hand() -> None:
    raw = torch.tensor([[0.0, math.log(3), 0.0, math.log(3), 9.0, 9.0]])  # sigmoid 1/2, 3/4
    torch.testing.assert_close(box_of(raw, torch.tensor([[2.0, 3.0]])), torch.tensor([[0.5, 1.0, 2.0, 2.25 * 3]]))


def test_one_cell_by_hand() -> None:
    """The target has half the sides of the prediction and its centre: IoU 1/4, and CIoU too. Objectness logit 1, its target 1/4."""
    raw, criterion = one_cell(objectness=1.0)
    total, parts = criterion([raw], torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5]]))
    share = 3 / 1  # gains are tuned for three levels
    box = 0.05 * share * (1 - 0.25)
    obj = 1.0 * share * 4.0 * (math.log(1 + math.exp(1)) - 0.25)  # BCE of logit x and target t is log(1 + e^x) - t x; level weight 4
    cls = 0.5 * 2 / 80 * share * math.log(2)  # logits 0
    torch.testing.assert_close(parts, torch.tensor([box, obj, cls]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, torch.tensor(box + obj + cls), rtol=1e-5, atol=1e-6)


def test_total_counts_the_images_of_the_batch() -> None:
    raw, criterion = one_cell()
    target = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5]])
    once = criterion([raw], target)
    thrice = criterion([raw.repeat(3, 1, 1, 1, 1)], target.repeat(3, 1) + torch.tensor([[0.0], [1], [2]]) * torch.eye(6)[0])
    torch.testing.assert_close(thrice.parts, once.parts)
    torch.testing.assert_close(thrice.total, 3 * once.total)


def test_gains_scale_their_part() -> None:
    maps, targets, anchors = some_maps(), some_targets(), torch.ones(3, 3, 2)
    base = DetectionLoss(anchors, 2, HYP, 640)(maps, targets).parts
    gained = DetectionLoss(anchors, 2, Hyp(box=0.1, cls=1.5, obj=2.0), 320)(maps, targets).parts
    torch.testing.assert_close(gained, base * torch.tensor([2, 2 / 4, 3]))  # objectness also by (320 / 640)^2


def test_positive_weights() -> None:
    raw, _ = one_cell()
    criterion = DetectionLoss(torch.ones(1, 1, 2), 2, Hyp(cls_pw=3.0, obj_pw=5.0), 640)
    _, parts = criterion([raw], torch.tensor([[0, 1, 0.5, 0.5, 1, 1]]))  # IoU 1: the objectness is positive
    torch.testing.assert_close(parts[1], torch.tensor(3 * 4.0 * 5 * math.log(2)))
    torch.testing.assert_close(parts[2], torch.tensor(0.5 * 2 / 80 * 3 * (3 + 1) / 2 * math.log(2)))


@pytest.mark.parametrize(("levels", "weights"), [(2, (4, 1)), (3, (4, 1, 0.4)), (4, (4, 1, 0.25, 0.06)), (5, (4, 1, 0.25, 0.06, 0.02))])
def test_level_weights(levels: int, weights: tuple[float, ...]) -> None:
    """Without targets only the objectness is left: log(1 + e^x) of every level, weighted."""
    maps = [torch.full_like(raw, n + 0.5).requires_grad_() for n, raw in enumerate(some_maps(levels))]
    total, parts = DetectionLoss(torch.ones(levels, 3, 2), 2, HYP, 640)(maps, torch.zeros(0, 6))
    expected = 3 / levels * sum(w * math.log(1 + math.exp(n + 0.5)) for n, w in enumerate(weights))
    torch.testing.assert_close(parts, torch.tensor([0.0, expected, 0.0]))
    total.backward()
    assert all(raw.grad.isfinite().all() and raw.grad[..., 4].any() for raw in maps)


def test_label_smoothing_by_hand() -> None:
    raw, criterion = one_cell(label_smoothing=0.2)  # wanted 0.9 and 0.1
    raw[..., 5:] = torch.tensor([2.0, -1.0])
    _, parts = criterion([raw], torch.tensor([[0, 0, 0.5, 0.5, 1, 1]]))
    expected = (math.log(1 + math.exp(2)) - 0.9 * 2 + math.log(1 + math.exp(-1)) + 0.1) / 2
    torch.testing.assert_close(parts[2], torch.tensor(0.5 * 2 / 80 * 3 * expected))


def test_a_single_class_has_no_class_loss() -> None:
    loss = DetectionLoss(torch.ones(3, 3, 2), 1, HYP, 640)(some_maps(nc=1), some_targets(nc=1))
    assert loss.parts[2] == 0 and loss.parts[0] > 0


def test_the_order_of_targets_does_not_matter() -> None:
    """Crowded on purpose: several targets meet in one cell, where the best IoU counts."""
    criterion, maps, targets = DetectionLoss(torch.ones(3, 3, 2), 2, HYP, 640), some_maps(), some_targets(40)
    losses, grads = [], []
    for order in (torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(3))):
        loss = criterion(maps, targets[order])
        losses.append(loss.parts)
        grads.append(torch.autograd.grad(loss.total, maps))
    torch.testing.assert_close(*losses)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_objectness_learns_the_best_of_two_that_meet() -> None:
    raw, criterion = one_cell(objectness=1.0)
    both = torch.tensor([[0, 1, 0.5, 0.5, 1.0, 1.0], [0, 1, 0.5, 0.5, 0.5, 0.5]])  # IoU 1 and 1/4
    for order in ([0, 1], [1, 0]):
        torch.testing.assert_close(criterion([raw], both[order]).parts[1], torch.tensor(3 * 4 * (math.log(1 + math.e) - 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite(dtype: torch.dtype) -> None:
    maps = [(raw.detach() * 30).to(dtype).requires_grad_() for raw in some_maps()]  # far into the sigmoids' tails
    total, parts = DetectionLoss(torch.ones(3, 3, 2), 2, HYP, 640)(maps, some_targets())
    total.backward()
    assert parts.dtype == torch.float32 and parts.isfinite().all() and not parts.requires_grad
    assert all(raw.grad.isfinite().all() for raw in maps)


def test_falls_over_20_steps_on_one_batch(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    images, targets = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), some_targets(8, batch=4)
    criterion, optimizer = DetectionLoss(model.head.anchors, 2, HYP, 64), torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(20):
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.parts)
    assert losses[-1].sum() < 0.85 * losses[0].sum()
    assert losses[-1][0] < 0.8 * losses[0][0] and losses[-1][2] < losses[0][2], "objectness alone may rise: its target is the IoU reached"


def test_levels_are_weighed_by_their_strides_in_any_order_and_number() -> None:
    def weights(*strides: int) -> list[float]:
        return DetectionLoss(torch.ones(len(strides), 3, 2), 2, HYP, 640, strides=strides).level_weights

    assert weights(8, 16, 32) == DetectionLoss(torch.ones(3, 3, 2), 2, HYP, 640).level_weights == [4.0, 1.0, 0.4]
    assert weights(32, 16, 8) == [0.4, 1.0, 4.0] and weights(16, 64, 32, 8) == [1.0, 0.06, 0.25, 4.0]
    assert weights(8, 16, 32, 64, 128, 256) == [4.0, 1.0, 0.25, 0.06, 0.02, 0.02]
