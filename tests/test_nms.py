"""Non-maximum suppression against a brute-force one and torchvision's, and at its edges."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from utils.boxes import cxcywh_to_xyxy
from utils.nms import VALIDATION, NmsOptions, non_max_suppression


def suppress(predictions: Tensor, *options: float, **named: object) -> list[Tensor]:
    """Image by image."""
    return [torch.from_numpy(non_max_suppression(image.numpy(), NmsOptions(*options, **named))) for image in predictions]


def random_predictions(n: int, classes: int, seed: int = 0, batch: int = 1, spread: float = 100) -> Tensor:
    """(B, n, 5 + C) crowded boxes."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(batch, n, 2, generator=generator) * spread
    size = torch.rand(batch, n, 2, generator=generator) * 40 + 2
    return torch.cat((centre, size, torch.rand(batch, n, 1 + classes, generator=generator)), -1)


def brute_force(image: Tensor, conf_thres: float, iou_thres: float, *, multi_label: bool = False, agnostic: bool = False,
                classes: list[int] | None = None, max_det: int = 1000) -> Tensor:  # fmt: skip
    """One image, box by box, in Python."""
    found = []
    for row in image.tolist():
        scores = [row[4] * c for c in row[5:]]
        for cls in range(len(scores)) if multi_label else [max(range(len(scores)), key=scores.__getitem__)]:
            if scores[cls] > conf_thres and (classes is None or cls in classes):
                found.append((*cxcywh_to_xyxy(torch.tensor(row[:4])).tolist(), scores[cls], cls))
    kept: list[tuple] = []
    for box in sorted(found, key=lambda b: -b[4]):
        if all(iou(box, other) <= iou_thres for other in kept if agnostic or other[5] == box[5]):
            kept.append(box)
    return torch.tensor(kept[:max_det]).view(-1, 6)


def iou(a: tuple, b: tuple) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


OPTIONS = [{}, {"multi_label": True}, {"agnostic": True}, {"multi_label": True, "agnostic": True}, {"classes": [1]}, 
           {"classes": [0, 2], "multi_label": True},            {"max_det": 3}, {"multi_label": True, "max_det": 7}, {"classes": []}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_classes", [1, 3])
def test_equals_brute_force(options, num_classes):
    for seed in range(4):
        predictions = random_predictions(60, num_classes, seed)
        for conf_thres, iou_thres in ((0.25, 0.45), (0.001, 0.6)):
            (ours,) = suppress(predictions, conf_thres, iou_thres, **options)
            torch.testing.assert_close(ours, brute_force(predictions[0], conf_thres, iou_thres, **options), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("max_det", [5, 50, 300, 100_000])
def test_equals_torchvisions(multi_label, max_det):
    """Enough candidates for several rounds."""
    predictions = random_predictions(3000, 7, 5, spread=640)
    (ours,) = suppress(predictions, 0.001, 0.6, multi_label=multi_label, max_det=max_det)
    scores = predictions[0, :, 5:] * predictions[0, :, 4:5]
    if not multi_label:
        scores *= torch.nn.functional.one_hot(scores.argmax(1), 7)
    row, cls = (scores > 0.001).nonzero(as_tuple=True)
    boxes, conf = cxcywh_to_xyxy(predictions[0, row, :4]), scores[row, cls]
    keep = batched_nms(boxes.double(), conf.double(), cls, 0.6).sort().values
    keep = keep[conf[keep].argsort(descending=True, stable=True)][:max_det]  # its own sort lets equal ones swap
    assert len(ours) == len(keep) > 4
    torch.testing.assert_close(ours, torch.cat((boxes[keep], conf[keep, None], cls[keep, None].float()), 1))


def test_many_boxes_of_one_object_hide_no_other():
    """The best 3000 candidates are one object: those after them are looked at too, beside what is kept, whatever the number wanted."""
    generator = torch.Generator().manual_seed(0)
    crowd = torch.tensor([50.0, 50, 20, 20]) + torch.rand(3000, 4, generator=generator)
    others = torch.cat((torch.arange(100)[:, None] * 30.0 + 200, torch.full((100, 3), 20.0)), 1)
    boxes = torch.cat((crowd, others, others + 0.5))
    conf = torch.linspace(0.9, 0.5, len(boxes))[:, None]
    predictions = torch.cat((boxes, conf, torch.ones_like(conf)), 1)[None]
    for max_det in (1, 2, 50, 101, 300):
        (found,) = suppress(predictions, 0.1, 0.5, max_det=max_det)
        assert len(found) == min(max_det, 101) and (found[1:, 0] == others[: len(found) - 1, 0] - 10).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 10**6), st.floats(0, 0.9), st.floats(0, 1), st.booleans(), st.booleans(),
       st.integers(1, 20))
def test_what_always_holds(n, num_classes, seed, conf_thres, iou_thres, multi_label, agnostic, max_det):
    predictions = random_predictions(n, num_classes, seed, batch=2)
    for boxes in suppress(predictions, conf_thres, iou_thres, multi_label=multi_label, agnostic=agnostic, max_det=max_det):
        assert boxes.shape[1:] == (6,) and len(boxes) <= max_det and boxes.dtype == torch.float32
        assert (boxes[:, 4] > conf_thres).all() and (boxes[:, 4].diff() <= 0).all() and ((boxes[:, 5] >= 0) & (boxes[:, 5] < num_classes)).all()
        overlap = box_iou(boxes[:, :4].double(), boxes[:, :4].double()).triu(1)
        if not agnostic:
            overlap = overlap * (boxes[:, 5:] == boxes[:, 5])
        assert (overlap <= iou_thres + 1e-6).all()


def test_single_equals_batched():
    predictions = random_predictions(200, 5, 1, batch=4)
    predictions[2, :, 4] = 0
    together = suppress(predictions, 0.1, 0.5, multi_label=True)
    assert [torch.equal(boxes, suppress(predictions[i : i + 1], 0.1, 0.5, multi_label=True)[0]) for i, boxes in enumerate(together)] == [True] * 4


def test_predictions_stay_as_they_are():
    predictions = random_predictions(50, 3)
    before = predictions.clone()
    suppress(predictions, 0.1, 0.5, multi_label=True)
    assert torch.equal(predictions, before)


@pytest.mark.parametrize("shape", [(0, 10, 8), (2, 0, 8), (2, 10, 8), (1, 10, 6)])
def test_nothing_found(shape):
    predictions = torch.zeros(shape)
    for options in OPTIONS:
        found = suppress(predictions, 0.001, 0.6, **options)
        assert [tuple(boxes.shape) for boxes in found] == [(0, 6)] * shape[0]


def test_the_threshold_itself_is_not_enough():
    predictions = torch.tensor([[[50.0, 50, 10, 10, 0.5, 1.0], [90, 50, 10, 10, 0.50001, 1.0]]])
    assert suppress(predictions, 0.5, 0.5)[0][:, 4].tolist() == pytest.approx([0.50001])


@pytest.mark.parametrize("column", range(8))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("multi_label", [True, False])
def test_what_is_not_finite_is_left_out(column, value, multi_label):
    predictions = torch.tensor([[[50.0, 50, 10, 10, 0.9, 0.8, 0.7, 0.6], [150, 50, 10, 10, 0.8, 0.9, 0.1, 0.1]]])
    value = value if column < 4 else float("nan")  # confidences are sigmoids: at worst no number
    alone = suppress(predictions[:, 1:], 0.05, 0.5, multi_label=multi_label)[0]
    predictions[0, 0, column] = value
    (found,) = suppress(predictions, 0.05, 0.5, multi_label=multi_label)
    assert found.isfinite().all() and len(found) >= len(alone)
    if column < 5:
        assert torch.equal(found, alone)


def test_of_equal_confidences_the_earlier_comes_first():
    predictions = torch.tensor([[[x, 50.0, 10, 10, 0.5, 0.5] for x in (50.0, 52, 54, 200)]])
    assert suppress(predictions, 0.1, 0.5)[0][:, 0].tolist() == [45, 49, 195]  # 52 is too near to 50
    assert suppress(predictions.flip(1), 0.1, 0.5)[0][:, 0].tolist() == [195, 49, 45]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ties_equal_brute_force(options):
    """Confidences of four values, corners on a coarse grid: many equal boxes and confidences, and IoUs at the threshold itself."""
    for seed in range(6):
        predictions = random_predictions(80, 3, seed, spread=60)
        predictions[..., :4] = (predictions[..., :4] / 8).round().clamp(min=1) * 8
        predictions[..., 4:] = (predictions[..., 4:] * 2).round().clamp(min=1) / 2
        for iou_thres in (0.25, 0.5):
            (ours,) = suppress(predictions, 0.1, iou_thres, **options)
            torch.testing.assert_close(ours, brute_force(predictions[0], 0.1, iou_thres, **options), rtol=0, atol=0)


def test_an_iou_at_the_threshold_is_not_above_it():
    boxes = torch.tensor([[[8.0, 8, 16, 16, 0.9, 1], [8, 4, 16, 8, 0.8, 1]]])  # the upper half: IoU 0.5
    assert len(suppress(boxes, 0.1, 0.5)[0]) == 2 and len(suppress(boxes, 0.1, 0.499)[0]) == 1


@pytest.mark.parametrize("agnostic", [True, False])
def test_boxes_without_area_overlap_none(agnostic):
    """Untrained networks have many: sides of a millionth of a pixel vanish beside the centre. As torchvision sees them."""
    sides = [(0.0, 0.0), (0, 8), (8, 0), (1e-7, 8), (8, 8), (1e-9, 1e-9)]
    boxes = torch.tensor([[x, 40, w, h, 0.9 - n / 100, 1] for x in (40.0, 40, 200) for n, (w, h) in enumerate(sides)])
    (found,) = suppress(boxes[None], 0.1, 0.5, agnostic=agnostic)
    assert len(found) == len(boxes) - 1  # of the two whole ones at 40 one
    xyxy, conf = cxcywh_to_xyxy(boxes[:, :4]), boxes[:, 4]
    keep = batched_nms(xyxy.double(), conf.double(), torch.zeros(len(boxes)), 0.5)
    assert sorted(map(tuple, found[:, :5].tolist())) == sorted(map(tuple, torch.cat((xyxy, conf[:, None]), 1)[keep].tolist()))


def test_boxes_of_two_classes_never_meet():
    """Also of neighbouring class numbers, of boxes far outside the image and of the largest images."""
    for size in (10.0, 1e4, 1e5):
        boxes = torch.tensor([[[size * x, size * x, size, size, 0.9, *row] for row in ((1.0, 0, 0), (0, 1, 0),
        (0, 0, 1))] for x in (-1, 0, 1)]).view(1, 9, 8)
        assert len(suppress(boxes, 0.1, 0.5)[0]) == 9 and len(suppress(boxes, 0.1, 0.5, agnostic=True)[0]) == 3


def test_small_boxes_of_late_classes_are_as_exact_as_of_the_first():
    """Shifting classes apart in float32 would round 4-pixel boxes of class 79 to a sixteenth of a pixel."""
    box = [1000.03, 1000.07, 4.1, 4.1]
    near = [1000.03 + 4.1 * 0.2499, 1000.07, 4.1, 4.1]  # IoU 0.6001
    far = [1000.03 + 4.1 * 0.2502, 1000.07, 4.1, 4.1]  # IoU 0.5997
    for cls in (0, 79):
        scores = torch.zeros(2, 80)
        scores[:, cls] = torch.tensor([0.9, 0.8])
        for other, kept in ((near, 1), (far, 2)):
            rows = torch.cat((torch.tensor([box, other]), torch.ones(2, 1), scores), 1)
            assert len(suppress(rows[None], 0.1, 0.6)[0]) == kept


def test_an_untrained_networks_noise_is_bounded():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.rand(1, 2000, 85, generator=generator) * 0.1 + 0.5
    predictions[..., :4] = predictions[..., :4] * 3000
    (found,) = suppress(predictions, 0.001, 0.6, multi_label=True, max_det=300)
    best = (predictions[0, :, 5:] * predictions[0, :, 4:5]).max()
    assert 0 < len(found) <= 300 and found[0, 4] == best


def test_half_precision():
    predictions = random_predictions(100, 3)
    (found,) = suppress(predictions.half(), 0.1, 0.5)
    assert found.dtype == torch.float16 and len(found) > 5


def test_the_options_are_the_arguments():
    predictions = random_predictions(300, 4, batch=2)
    assert NmsOptions() == NmsOptions(0.25, 0.45, False, False, None, 1000)
    for options, same in ((NmsOptions(), {}), (VALIDATION, {"conf_thres": 0.001, "iou_thres": 0.6, "multi_label": True, "max_det": 300})):
        for a, b in zip(suppress(predictions, **vars(options)), suppress(predictions, **same), strict=True):
            assert torch.equal(a, b)
