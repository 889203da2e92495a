"""Curves against numbers worked by hand, a plain recount and COCO's AP50; the confusion matrix by hand and by its sums."""
from __future__ import annotations

import numpy as np
import pytest
from tiny import make_split

from utils.evaluate.coco import Detections, Truth, coco_scores
from utils.evaluate.confusion import confusion_matrix
from utils.evaluate.curves import curves
from utils.evaluate.table import score_table
from utils.evaluate.validate import Speed, ValResult

NO_TRUTH = Truth(np.zeros((0, 4)), np.zeros(0, int))
NO_DETECTIONS = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
TRUTH = Truth(np.array([[0, 0, 10, 10], [50, 50, 60, 60], [100, 100, 120, 120]]), np.array([0, 0, 1]))
FOUND = Detections(
    np.array([[0, 0, 10, 10], [80, 80, 90, 90], [50, 50, 60, 56], [0, 0, 10, 9]]), np.array([0.9, 0.8, 0.7, 0.3]), np.array([0, 0, 0, 0])
)  # class 0: right, wrong, right, a second box on a taken truth


def random_data(seed: int, images: int = 6, num_classes: int = 4) -> tuple[list[Truth], list[Detections]]:
    rng = np.random.default_rng(seed)
    truths, detections = [], []
    for _ in range(images):
        m, n = rng.integers(0, 9), rng.integers(0, 40)
        corner = rng.random((m, 2)) * 200
        boxes = np.concatenate((corner, corner + 10 + rng.random((m, 2)) * 90), 1)
        truths.append(Truth(boxes, rng.integers(0, num_classes, m)))
        of = rng.integers(0, m, n) if m else np.zeros(0, int)
        found = np.sort((boxes[of] + rng.normal(0, 8, (len(of), 4))).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        cls = np.where(rng.random(len(of)) < 0.7, truths[-1].cls[of], rng.integers(0, num_classes, len(of)))
        detections.append(Detections(found, rng.random(len(of)), cls))
    return truths, detections


def at(grid: np.ndarray, conf: float) -> int:
    return int(np.searchsorted(grid, conf))


@pytest.mark.parametrize(
    ("conf", "precision", "recall"),
    [(0.2, 2 / 4, 1), (0.5, 2 / 3, 1), (0.75, 1 / 2, 1 / 2), (0.85, 1, 1 / 2), (0.95, 1, 0)],
)
def test_by_hand(conf: float, precision: float, recall: float) -> None:
    result = curves([TRUTH], [FOUND], 3)
    i = at(result.conf, conf)
    assert result.precision[0, i] == pytest.approx(precision)
    assert result.recall[0, i] == pytest.approx(recall)
    assert result.f1[0, i] == pytest.approx(2 * precision * recall / (precision + recall))


def test_classes_without_truth_or_detections() -> None:
    result = curves([TRUTH], [FOUND], 3)
    assert result.classes.tolist() == [0, 1]
    assert (result.precision[1] == 0).all() and (result.recall[1] == 0).all() and result.ap50[1] == 0
    assert np.isnan(result.precision[2]).all() and np.isnan(result.ap50[2])
    assert result.mean(result.ap50) == pytest.approx(result.ap50[:2].mean())
    assert 0.3 < result.best_conf <= 0.7  # F1 4/5 there; 2/3 below, 1/2 and 2/3 above
    assert result.f1_at_best[0] == pytest.approx(4 / 5)


@pytest.mark.parametrize("truths", [[], [NO_TRUTH], [TRUTH]])
def test_nothing_found(truths: list[Truth]) -> None:
    result = curves(truths, [NO_DETECTIONS] * len(truths), 3)
    assert result.mean(result.precision_at_best) == result.mean(result.recall_at_best) == result.mean(result.ap50) == 0
    assert result.mean(result.f1).shape == (1000,)


@pytest.mark.parametrize("seed", range(5))
def test_each_threshold_equals_a_fresh_count(seed: int) -> None:
    """The curve at a confidence is what the data set gives when weaker detections never existed."""
    truths, detections = random_data(seed)
    result = curves(truths, detections, 4)
    for i in (0, 250, 500, 900):
        kept = [Detections(d.xyxy[k], d.conf[k], d.cls[k]) for d in detections for k in [d.conf >= result.conf[i]]]
        for k in result.classes:
            matrix = confusion_matrix(
                [Truth(t.xyxy[t.cls == k], t.cls[t.cls == k]) for t in truths],
                [Detections(d.xyxy[d.cls == k], d.conf[d.cls == k], d.cls[d.cls == k]) for d in kept], 4, 0.0, 0.5,
            )  # fmt: skip
            right, predicted, true = matrix[k, k], matrix[k].sum(), matrix[:, k].sum()
            assert result.recall[k, i] == pytest.approx(right / true)
            assert not predicted or result.precision[k, i] == pytest.approx(right / predicted)


@pytest.mark.parametrize("seed", range(5))
def test_ap50_is_cocos(seed: int) -> None:
    truths, detections = random_data(seed)
    np.testing.assert_allclose(curves(truths, detections, 5).ap50, coco_scores(truths, detections, 5).per_class_ap50)


def test_crowds_are_left_out() -> None:
    crowd = TRUTH._replace(crowd=np.array([True, False, False]))
    result = curves([crowd], [FOUND], 2)
    i = at(result.conf, 0.2)
    assert (result.precision[0, i], result.recall[0, i]) == (1 / 2, 1)  # both boxes on the crowd are neither right nor wrong
    assert confusion_matrix([crowd], [FOUND], 2).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_confusion_by_hand() -> None:
    found = Detections(
        np.array([[0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 9], [100, 100, 120, 120]]), np.array([0.9, 0.8, 0.7, 0.1]), np.array([0, 1, 0, 1])
    )
    assert confusion_matrix([TRUTH], [found], 2).tolist() == [
        [1, 0, 1],  # predicted 0: right; a second box on a taken truth is a false alarm
        [1, 0, 0],  # predicted 1: a 0
        [0, 1, 0],  # missed: the 1, whose detection is below 0.25
    ]


def test_confusion_takes_the_nearest_truth_whatever_its_class() -> None:
    truth = Truth(np.array([[0, 0, 10, 10], [0, 0, 10, 13]]), np.array([0, 1]))
    found = Detections(np.array([[0, 0, 10, 13]]), np.array([0.9]), np.array([0]))
    assert confusion_matrix([truth], [found], 2).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_confusion_sums(seed: int) -> None:
    truths, detections = random_data(seed)
    matrix = confusion_matrix(truths, detections, 4)
    assert matrix[:, :4].sum(0).tolist() == np.bincount(np.concatenate([t.cls for t in truths]), minlength=4).tolist()
    sure = np.concatenate([d.cls[d.conf >= 0.25] for d in detections])
    assert matrix[:4].sum(1).tolist() == np.bincount(sure, minlength=4).tolist()
    assert matrix[4, 4] == 0


@pytest.mark.parametrize("num_classes", [1, 4])
def test_more_than_a_hundred_objects_an_image(num_classes: int) -> None:
    """COCO's mAP stops at 100 of a class; what is found beyond it is found all the same."""
    x, y = np.meshgrid(np.arange(20) * 20.0, np.arange(20) * 20.0)
    boxes = np.stack((x, y, x + 15, y + 15), -1).reshape(-1, 4)
    cls = np.arange(400) % num_classes
    truth, found = Truth(boxes, cls), Detections(boxes, np.linspace(0.9, 0.5, 400), cls)
    assert (confusion_matrix([truth], [found], num_classes) == np.diag([400 // num_classes] * num_classes + [0])).all()
    result = curves([truth], [found], num_classes)
    assert (result.recall_at_best == 1).all() and (result.precision_at_best == 1).all()
    assert result.mean(result.ap50) == pytest.approx(coco_scores([truth], [found], num_classes).ap50)


def test_confusion_of_nothing() -> None:
    assert (confusion_matrix([], [], 2) == 0).all() and (confusion_matrix([NO_TRUTH], [NO_DETECTIONS], 2) == 0).all()


def test_crowds_are_no_objects_of_the_table() -> None:
    names = ("a", "b")
    split = make_split(["1.png"], [(100, 100)], [np.zeros((0, 5))], names)
    for crowd, objects in ((None, 3), (np.array([True, False, False]), 2)):
        truth = TRUTH._replace(crowd=crowd)
        scores = coco_scores([truth], [FOUND], 2)
        result = ValResult((0,), [truth], [FOUND], scores, curves([truth], [FOUND], 2), None, Speed(0, 0, 0))
        assert score_table(result, split, per_class=True).splitlines()[1].split()[:3] == ["all", "1", str(objects)]
