"""coco_scores against pycocotools on random data of every awkward kind, and numbers worked by hand."""
from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.evaluate.coco import CocoScores, Detections, Truth, coco_scores


def pycocotools_eval(truths: list[Truth], detections: list[Detections], num_classes: int) -> COCOeval:
    images = [{"id": i} for i in range(len(truths))]
    categories = [{"id": k} for k in range(num_classes)]
    annotations = []
    for image, truth in enumerate(truths):
        for j, (x1, y1, x2, y2) in enumerate(truth.xyxy.astype(float)):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": int(truth.cls[j]), "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1) if truth.area is None else float(truth.area[j]),
                "iscrowd": 0 if truth.crowd is None else int(truth.crowd[j]),
            })  # fmt: skip
    results = [
        {"image_id": image, "category_id": int(k), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)}
        for image, found in enumerate(detections)
        for (x1, y1, x2, y2), score, k in zip(found.xyxy.astype(float), found.conf, found.cls, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth_set, result_set = COCO(), COCO()
        truth_set.dataset = {"images": images, "categories": categories, "annotations": annotations}
        truth_set.createIndex()
        result_set.dataset = {"images": images, "categories": categories, "annotations": []}
        result_set.createIndex()
        evaluation = COCOeval(truth_set, truth_set.loadRes(results) if results else result_set, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_equal(scores: CocoScores, expected: COCOeval) -> None:
    mine = [scores.ap, scores.ap50, scores.ap75, scores.ap_small, scores.ap_medium, scores.ap_large, scores.ar]
    np.testing.assert_allclose(np.nan_to_num(mine, nan=-1), [*expected.stats[:6], expected.stats[8]], atol=1e-12)
    precision = expected.eval["precision"][:, :, :, 0, 2]  # (T, R, C)
    np.testing.assert_allclose(np.nan_to_num(scores.per_class_ap, nan=-1), precision.mean((0, 1)), atol=1e-12)
    np.testing.assert_allclose(np.nan_to_num(scores.per_class_ap50, nan=-1), precision[0].mean(0), atol=1e-12)


def random_boxes(rng: np.random.Generator, n: int, scale: float, whole: bool) -> np.ndarray:
    corner, size = rng.random((n, 2)) * scale, (rng.random((n, 2)) ** 2 + 0.02) * scale
    boxes = np.concatenate((corner, corner + size), 1)
    return np.round(boxes) if whole else boxes  # whole numbers give equal IoUs, exact thresholds and boxes without area


def random_case(seed: int) -> tuple[list[Truth], list[Detections], int]:
    """Images without truth or detections, crowds, given areas, tied scores, absent classes, near-copies of truths, many detections."""
    rng = np.random.default_rng(seed)
    num_classes, scale = int(rng.integers(1, 6)), float(rng.choice([6, 40, 120, 700, 5000]))
    whole, steps = bool(rng.integers(2)), int(rng.choice([2, 5, 1000]))
    truths, detections = [], []
    for _ in range(rng.integers(1, 7)):
        m, n = int(rng.integers(0, 12)) * int(rng.integers(2)), int(rng.choice([0, 3, 20, 60, 260]))
        boxes = random_boxes(rng, m, scale, whole)
        truth = Truth(
            boxes,
            rng.integers(0, rng.integers(1, num_classes + 1), m),
            rng.choice([100.0, 1024.0, 5000.0, 9216.0, 1e6], m) if rng.integers(2) else None,
            rng.random(m) < 0.25 if rng.integers(2) else None,
        )
        found, cls = random_boxes(rng, n, scale, whole), rng.integers(0, num_classes, n)
        if m and n:
            near, of = rng.random(n) < 0.8, rng.integers(0, m, n)
            shift = rng.normal(0, 0.08, (n, 4)) * np.tile(boxes[of, 2:] - boxes[of, :2], 2)
            found[near] = (boxes[of] + (np.round(shift) if whole else shift))[near]
            cls[near] = truth.cls[of][near]
            found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        truths.append(truth)
        detections.append(Detections(found.astype(rng.choice([np.float32, np.float64])), rng.integers(0, steps, n) / steps, cls))
    return truths, detections, num_classes


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_equals_pycocotools(first: int) -> None:
    for seed in range(first, first + 10):
        case = random_case(seed)
        assert_equal(coco_scores(*case), pycocotools_eval(*case))


def test_equals_pycocotools_where_a_class_exceeds_a_hundred_detections() -> None:
    rng = np.random.default_rng(0)
    truth = Truth(random_boxes(rng, 40, 300, False), np.zeros(40, int))
    found = truth.xyxy[rng.integers(0, 40, 400)] + rng.normal(0, 3, (400, 4))
    case = [truth], [Detections(found, rng.random(400), rng.integers(0, 2, 400))], 2
    assert_equal(coco_scores(*case), pycocotools_eval(*case))


@pytest.mark.parametrize("exact", [0, 1])
def test_equals_pycocotools_where_two_truths_overlap_alike(exact: int) -> None:
    """The first detection lies midway; which truth it takes decides whether the second, exactly on one of them, is right."""
    truth = Truth(np.array([[0, 0, 10, 10], [4, 0, 14, 10]]), np.array([0, 0]))
    found = Detections(np.array([[2, 0, 12, 10], truth.xyxy[exact]]), np.array([0.9, 0.8]), np.array([0, 0]))
    scores = coco_scores([truth], [found], 1)
    assert_equal(scores, pycocotools_eval([truth], [found], 1))
    assert (scores.ap50 == 1) == (exact == 0)


def test_by_hand() -> None:
    """Two truths; found: one exactly, a false alarm, the other with IoU 0.6 (right at 0.5, 0.55, 0.6)."""
    truth = Truth(np.array([[0, 0, 10, 10], [50, 50, 60, 60]]), np.array([0, 0]))
    found = Detections(np.array([[0, 0, 10, 10], [80, 80, 90, 90], [50, 50, 60, 56]]), np.array([0.9, 0.8, 0.7]), np.array([0, 0, 0]))
    scores = coco_scores([truth], [found], 2)
    reached, missed = (51 * 1 + 50 * 2 / 3) / 101, 51 / 101  # recall 0 … 0.5 at precision 1, 0.51 … 1 at 2/3 or never
    assert scores.ap50 == pytest.approx(reached)
    assert scores.ap75 == pytest.approx(missed)
    assert scores.ap == pytest.approx((3 * reached + 7 * missed) / 10)
    assert scores.ap_small == pytest.approx(scores.ap)
    assert np.isnan(scores.ap_medium) and np.isnan(scores.ap_large)
    assert scores.ar == pytest.approx((3 * 1 + 7 * 0.5) / 10)
    assert scores.per_class_ap[0] == scores.ap and np.isnan(scores.per_class_ap[1])


@pytest.mark.parametrize("images", [0, 1, 3])
def test_nothing_to_score(images: int) -> None:
    empty_truth = Truth(np.zeros((0, 4)), np.zeros(0, int))
    none_found = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    scores = coco_scores([empty_truth] * images, [none_found] * images, 2)
    assert np.isnan(scores.ap) and np.isnan(scores.ar) and np.isnan(scores.per_class_ap).all()

    truth = Truth(np.array([[0, 0, 5, 5]]), np.array([1]))
    scores = coco_scores([truth] * images, [none_found] * images, 2)
    assert np.isnan(scores.ap) if images == 0 else scores.ap == scores.ar == 0


def test_order_of_detections_does_not_matter_and_arguments_stay() -> None:
    truths, detections, num_classes = random_case(7)
    distinct = [d._replace(conf=np.random.default_rng(i).permutation(len(d.conf)) / 1000 + i / 1e6) for i, d in enumerate(detections)]
    turned = [Detections(d.xyxy[::-1], d.conf[::-1], d.cls[::-1]) for d in distinct]
    before = [d.xyxy.copy() for d in distinct]
    assert coco_scores(truths, distinct, num_classes).ap == coco_scores(truths, turned, num_classes).ap
    assert all((d.xyxy == b).all() for d, b in zip(distinct, before, strict=True))


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    coco_scores(*random_case(1))
    assert capfd.readouterr() == ("", "")


def test_unequal_numbers_of_images() -> None:
    with pytest.raises(ValueError, match="2 images' truths, 1 images' detections"):
        coco_scores([Truth(np.zeros((0, 4)), np.zeros(0, int))] * 2, [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))], 1)
