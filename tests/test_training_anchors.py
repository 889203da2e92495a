"""Anchors: recall by hand, and fitting that must beat bad ones."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ANCHORS, make_split, tiny_model

from utils.training.anchors import adapt_anchors, best_possible_recall, boxes_in_pixels, check_anchors, fit_anchors

BAD = np.array([[200.0, 10], [10, 200], [300, 300], [300, 20], [20, 300], [310, 310], [250, 250], [8, 300], [300, 8]])


def clusters(count: int = 300, seed: int = 0) -> np.ndarray:
    """Boxes of three kinds: small squares, wide ones, tall ones."""
    rng = np.random.default_rng(seed)
    centres = np.array([[12, 12], [60, 20], [25, 90]])
    return centres[rng.integers(0, 3, count)] * rng.lognormal(0, 0.15, (count, 2))


def test_recall_by_hand() -> None:
    """Anchors 10 x 10 and 40 x 20, threshold 4: the box 39 x 11 fits both, 41 x 10 the second, 3 x 10 the first, 10 x 100 and 2.5 x 10 none."""
    anchors = np.array([[10.0, 10], [40, 20]])
    wh = np.array([[39.0, 11], [41, 10], [3, 10], [10, 100], [2.5, 10]])
    assert best_possible_recall(wh, anchors, 4.0) == pytest.approx(3 / 5)
    assert best_possible_recall(wh[:3], anchors, 4.0) == 1
    assert best_possible_recall(np.zeros((0, 2)), anchors, 4.0) == 1


def test_boxes_in_pixels_by_hand() -> None:
    boxes = [np.array([[0, 0.5, 0.5, 0.5, 0.5], [1, 0.5, 0.5, 0.01, 0.5]]), np.zeros((0, 5)), np.array([[0, 0.5, 0.5, 1, 0.25]])]
    wh = boxes_in_pixels(boxes, np.array([[200, 100], [50, 50], [100, 400]]), 64)
    np.testing.assert_allclose(wh, [[32, 16], [16, 16]])  # the second is 0.64 px wide: left out
    assert boxes_in_pixels([], np.zeros((0, 2)), 64).shape == (0, 2)


def test_fitted_anchors_find_the_clusters() -> None:
    anchors = fit_anchors(clusters(), 3, 4.0, np.random.default_rng(0), generations=300)
    np.testing.assert_allclose(anchors, [[12, 12], [60, 20], [25, 90]], rtol=0.15)
    assert (np.diff(anchors.prod(1)) > 0).all()


def test_evolution_improves_on_k_means() -> None:
    wh = np.random.default_rng(3).lognormal(3, 0.8, (400, 2))
    mean_closeness = lambda a: np.minimum(wh[:, None] / a, a / wh[:, None]).min(2).max(1).mean()  # noqa: E731
    seeds, evolved = (fit_anchors(wh, 6, 4.0, np.random.default_rng(0), generations=g) for g in (0, 500))
    assert mean_closeness(evolved) > mean_closeness(seeds) + 0.005


@pytest.mark.parametrize("wh", [np.full((9, 2), 20.0), np.array([[20.0, 10]] * 8 + [[10, 20]]), np.array([[20.0, 30.0]] * 40)])
def test_few_or_equal_boxes_give_finite_anchors(wh: np.ndarray) -> None:
    anchors = fit_anchors(wh, 9, 4.0, np.random.default_rng(0), generations=50)
    assert anchors.shape == (9, 2) and np.isfinite(anchors).all() and (anchors >= 2).all()
    assert best_possible_recall(wh, anchors, 4.0) == 1


def test_good_anchors_are_kept() -> None:
    good = np.array([[12.0, 12], [60, 20], [25, 90]]).reshape(3, 1, 2)
    new, why = check_anchors(clusters(), good, 4.0, False, np.random.default_rng(0))
    assert new is good and "kept" in why and "100.0%" in why


def test_bad_anchors_are_refitted_and_must_fit_always() -> None:
    bad = BAD.reshape(3, 3, 2)
    new, why = check_anchors(clusters(), bad, 4.0, False, np.random.default_rng(0))
    assert new.shape == bad.shape and best_possible_recall(clusters(), new.reshape(-1, 2), 4.0) > 0.98 and "refitted" in why
    good = np.tile([[12.0, 12], [60, 20], [25, 90]], (3, 1)).reshape(3, 3, 2)
    new, _ = check_anchors(clusters(), good, 4.0, True, np.random.default_rng(0))
    assert new is not good


def test_too_few_boxes_leave_the_anchors() -> None:
    bad = BAD.reshape(3, 3, 2)
    assert check_anchors(np.array([[5.0, 5.0]]), bad, 4.0, False, np.random.default_rng(0))[0] is bad


def split_of(wh_px: np.ndarray, side: int = 320) -> object:
    boxes = np.concatenate((np.tile([0, 0.5, 0.5], (len(wh_px), 1)), wh_px / side), 1)
    return make_split(["a.png"], [(side, side)], [boxes])


def test_a_bare_number_of_anchors_is_always_fitted(tmp_path: Path) -> None:
    """`anchors: 3` in the YAML, also with --noautoanchor; the checkpoint's spec then tells them."""
    for keep in (False, True):
        model = tiny_model(tmp_path, anchors=3)
        assert not model.head.anchors_given
        why = adapt_anchors(model, split_of(clusters()), 320, 4.0, keep, 0)
        assert "refitted" in why
        assert best_possible_recall(clusters(), model.anchors_px.numpy().reshape(-1, 2), 4.0) > 0.98
        np.testing.assert_allclose(np.array(model.spec.anchors).reshape(3, 3, 2), model.anchors_px.numpy(), atol=0.006)
        areas = model.anchors_px.prod(-1).mean(1)
        assert (areas.diff() > 0).all(), "small anchors belong to the fine level"


def test_named_anchors_are_kept_or_refitted(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, anchors=BAD.reshape(3, 6).tolist())
    before = model.anchors_px.clone()
    assert "kept" in adapt_anchors(model, split_of(clusters()), 320, 4.0, True, 0) and torch.equal(before, model.anchors_px)
    assert "refitted" in adapt_anchors(model, split_of(clusters()), 320, 4.0, False, 0)
    again = tiny_model(tmp_path, anchors=BAD.reshape(3, 6).tolist())
    adapt_anchors(again, split_of(clusters()), 320, 4.0, False, 0)
    assert torch.equal(again.anchors_px, model.anchors_px), "a seed gives the same anchors"
    good = tiny_model(tmp_path)
    assert "kept" in adapt_anchors(good, split_of(np.array(ANCHORS).reshape(-1, 2)), 320, 4.0, False, 0)
