"""Box geometry: there and back, IoU by hand and by torchvision, gradients of degenerate boxes, the letterbox's way back."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import complete_box_iou_loss

from utils.boxes import Letterbox, centre_in, clip_xyxy, cxcywh_to_xyxy, scaled_to, xyxy_to_cxcywh
from utils.training.ciou import ciou


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_formats_by_hand(make):
    cxcywh, xyxy = make([[10.0, 20, 4, 6], [0, 0, 1, 1]]), make([[8.0, 17, 12, 23], [-0.5, -0.5, 0.5, 0.5]])
    assert cxcywh_to_xyxy(cxcywh).tolist() == xyxy.tolist() and xyxy_to_cxcywh(xyxy).tolist() == cxcywh.tolist()
    assert type(cxcywh_to_xyxy(cxcywh)) is type(cxcywh)
    assert cxcywh_to_xyxy(cxcywh[:0]).shape == (0, 4) == xyxy_to_cxcywh(cxcywh[:0]).shape
    assert cxcywh_to_xyxy(cxcywh[None]).shape == (1, 2, 4) and cxcywh_to_xyxy(cxcywh[0]).shape == (4,)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_clipping_makes_a_new_array(make):
    boxes = make([[-3.0, -2, 50, 60], [1, 2, 3, 4], [70, 80, 90, 99]])
    before = boxes.tolist()
    assert clip_xyxy(boxes, 40, 30).tolist() == [[0, 0, 40, 30], [1, 2, 3, 4], [40, 30, 40, 30]] and boxes.tolist() == before
    assert clip_xyxy(boxes[:0], 40, 30).shape == (0, 4)


# CIoU


def test_ciou_by_hand():
    """IoU - (distance of centres / diagonal of the hull)^2 - alpha v, with v = 4 / pi^2 (difference of the angles atan(w / h))^2."""
    a = torch.tensor([[2.0, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 4, 2]])
    b = torch.tensor([[2.0, 2, 2, 2], [3, 2, 2, 2], [7, 2, 2, 2], [2, 2, 2, 4]])
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(0.5)) ** 2
    iou = 4 / 12  # 4 x 2 and 2 x 4 share 2 x 2
    expected = [
        1,
        1 / 3 - 1 / (3**2 + 2**2),  # they share 1 x 2 of 2 x 2 each; the hull is 3 x 2
        0 - 25 / (7**2 + 2**2),  # apart: the hull is 7 x 2
        iou - 0 - v / (1 - iou + v) * v,
    ]
    assert ciou(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def boxes_of(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.cat((torch.rand(n, 2, generator=generator) * 20, torch.rand(n, 2, generator=generator) * 10 + 0.1), 1)


def test_ciou_and_its_gradient_equal_torchvisions():
    generator = torch.Generator().manual_seed(0)
    a, b = boxes_of(1000, generator).requires_grad_(), boxes_of(1000, generator)
    ours = 1 - ciou(a, b)
    theirs = complete_box_iou_loss(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), a)
    (expected,) = torch.autograd.grad(theirs.sum(), a)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_ciou_is_symmetric_and_at_most_one():
    generator = torch.Generator().manual_seed(1)
    a, b = boxes_of(500, generator), boxes_of(500, generator)
    torch.testing.assert_close(ciou(a, b), ciou(b, a))
    assert (ciou(a, b) <= 1).all() and (ciou(a, b) > -2).all()
    torch.testing.assert_close(ciou(a, a), torch.ones(500), rtol=0, atol=1e-4)
    assert ciou(a[:0], b[:0]).shape == (0,)


DEGENERATE = [[0, 0, 0, 0], [5, 5, 0, 3], [5, 5, 3, 0], [5, 5, 1e-12, 1e-12], [5, 5, 1e4, 1e-6], [1e4, 1e4, 1e4, 1e4], [5, 5, 3, 3],
              [-5, 5, 1e-3, 1e3]]


def test_gradients_of_degenerate_boxes_are_finite():
    pairs = [(a, b) for a in DEGENERATE for b in DEGENERATE]
    a, b = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float32, requires_grad=True) for i in (0, 1))
    values = ciou(a, b)
    assert values.isfinite().all()
    values.sum().backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


# Letterbox

SIDES = st.integers(1, 4000)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SIDES, SIDES, st.integers(32, 1280), st.integers(0, 100), st.integers(0, 100), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_letterbox_there_and_back(width, height, longer, pad_x, pad_y, fractions):
    scaled = scaled_to((width, height), longer)
    assert max(scaled) == longer and min(scaled) >= 1
    target = scaled[0] + pad_x, scaled[1] + pad_y
    box = centre_in((width, height), scaled, target)
    (left, right), (top, bottom) = sorted(fractions[:2]), sorted(fractions[2:])
    corners = np.array([left * width, top * height, right * width, bottom * height])
    inside = box.forward(corners)
    assert (inside >= -1e-9).all() and (inside[0::2] <= target[0] + 1e-9).all() and (inside[1::2] <= target[1] + 1e-9).all()
    np.testing.assert_allclose(box.back(inside), corners, rtol=0, atol=1e-9 * max(width, height))
    single = torch.tensor(corners, dtype=torch.float32)
    torch.testing.assert_close(box.back(box.forward(single)), single, rtol=0, atol=1e-5 * max(width, height) * max(1, longer / max(width, height)))
    # the whole image fills exactly its part of the target, to the pixel
    whole = box.forward(np.array([0.0, 0, width, height]))
    np.testing.assert_allclose(whole, [pad_x // 2, pad_y // 2, pad_x // 2 + scaled[0], pad_y // 2 + scaled[1]], atol=1e-9)


def test_letterbox_by_hand():
    """1920 x 1080 at 640: 640 x 360, centred in 640 x 384 with 12 rows above."""
    assert scaled_to((1920, 1080), 640) == (640, 360)
    box = centre_in((1920, 1080), (640, 360), (640, 384))
    assert box == Letterbox(1 / 3, 1 / 3, 0, 12, 1920, 1080)
    assert box.forward(np.array([[0.0, 0, 1920, 1080], [300, 30, 600, 90]])).tolist() == [[0, 12, 640, 372], [100, 22, 200, 42]]
    assert box.back(torch.tensor([[-10.0, 0, 700, 400]])).tolist() == [[0, 0, 1920, 1080]]  # clipped to the image


def test_letterbox_of_whole_pixels_that_are_not_the_exact_ratio():
    """3 x 1000 at 100 is 1 pixel wide though 0.3 would be exact: the gains are those of the pixels really made."""
    assert scaled_to((3, 1000), 100) == (1, 100)
    box = centre_in((3, 1000), (1, 100), (32, 128))
    assert (box.gain_x, box.gain_y, box.left, box.top) == (1 / 3, 0.1, 15, 14)
    assert box.back(np.array([[15.0, 14, 16, 114]])).tolist() == pytest.approx(np.array([[0.0, 0, 3, 1000]]))


def test_letterbox_of_no_boxes():
    box = centre_in((10, 10), (20, 20), (32, 32))
    assert box.back(np.zeros((0, 4))).shape == (0, 4) and box.forward(torch.zeros(0, 4)).shape == (0, 4)
    assert box.back(np.zeros((2, 4), np.float32)).dtype == np.float32
