"""The matching rule: numbers worked by hand, and a slow reference that looks at every cell and anchor."""
from __future__ import annotations

import pytest
import torch

from utils.training.assign import Matches, assign

GRIDS = [(8, 8), (4, 4), (2, 2)]  # of 64 px at the strides 8, 16, 32


def one_level(targets: list[list[float]], anchors: list[list[float]], grid: tuple[int, int] = (8, 8), anchor_t: float = 4.0) -> Matches:
    (matches,) = assign(torch.tensor(targets).view(-1, 6), torch.tensor([anchors]), [grid], anchor_t)
    return matches


def cells(matches: Matches) -> set[tuple[int, int]]:
    return set(zip(matches.column.tolist(), matches.row.tolist(), strict=True))


def test_left_and_upper_neighbour_by_hand() -> None:
    """Centre (3.2, 4.4) of 8 x 8 cells: left and upper halves of its cell, so the left and the upper neighbour learn it too."""
    m = one_level([[5, 1, 0.4, 0.55, 0.25, 0.5]], [[2.0, 4.0]])
    assert cells(m) == {(3, 4), (2, 4), (3, 3)} and len(m.cls) == 3
    by_cell = {(c, r): box for c, r, box in zip(m.column.tolist(), m.row.tolist(), m.cxcywh, strict=True)}
    torch.testing.assert_close(by_cell[3, 4], torch.tensor([0.2, 0.4, 2.0, 4.0]))
    torch.testing.assert_close(by_cell[2, 4], torch.tensor([1.2, 0.4, 2.0, 4.0]))
    torch.testing.assert_close(by_cell[3, 3], torch.tensor([0.2, 1.4, 2.0, 4.0]))
    assert m.image.tolist() == [5] * 3 and m.cls.tolist() == [1] * 3 and m.anchor.tolist() == [0] * 3
    assert m.anchor_wh.tolist() == [[2.0, 4.0]] * 3


@pytest.mark.parametrize(
    ("cx", "cy", "expected"),
    [
        (3.7 / 8, 4.9 / 8, {(3, 4), (4, 4), (3, 5)}),  # right and lower half
        (3.7 / 8, 4.2 / 8, {(3, 4), (4, 4), (3, 3)}),
        (0.2 / 8, 0.3 / 8, {(0, 0)}),  # the corner: what would lie outside does not exist
        (0.2 / 8, 0.7 / 8, {(0, 0), (0, 1)}),
        (7.8 / 8, 7.9 / 8, {(7, 7)}),
        (1.0, 1.0, {(7, 7)}),  # on the far border
        (0.0, 0.0, {(0, 0)}),
    ],
)
def test_neighbours_and_borders_by_hand(cx: float, cy: float, expected: set) -> None:
    assert cells(one_level([[0, 0, cx, cy, 0.25, 0.25]], [[2.0, 2.0]])) == expected


def test_ratio_threshold_on_both_sides() -> None:
    """Anchor 2 x 2 in cells, threshold 4: sides above 0.5 and below 8 fit, and both must."""
    def fits(w: float, h: float) -> bool:
        return len(one_level([[0, 0, 0.5, 0.5, w / 8, h / 8]], [[2.0, 2.0]]).cls) > 0

    assert fits(2, 2) and fits(7.9, 7.9) and fits(0.51, 0.51) and fits(7.9, 0.51)
    assert not fits(8, 8) and not fits(0.5, 0.5) and not fits(2, 8) and not fits(0.5, 2) and not fits(2, 8.1)
    assert not fits(0, 2)
    assert len(one_level([[0, 0, 0.5, 0.5, 0.45, 0.45]], [[2.0, 2.0]], anchor_t=1.5).cls) == 0
    assert len(one_level([[0, 0, 0.5, 0.5, 0.35, 0.35]], [[2.0, 2.0]], anchor_t=1.5).cls) > 0


def test_every_fitting_anchor_takes_the_target() -> None:
    m = one_level([[0, 0, 0.4, 0.4, 0.25, 0.25]], [[1.0, 1.0], [20.0, 20.0], [3.0, 2.0]])
    assert sorted(set(m.anchor.tolist())) == [0, 2] and len(m.cls) == 6


def test_no_targets() -> None:
    for m in assign(torch.zeros(0, 6), torch.ones(3, 2, 2), GRIDS, 4.0):
        assert [tuple(part.shape) for part in m] == [(0,), (0,), (0,), (0,), (0, 4), (0, 2), (0,)]


def reference(targets: torch.Tensor, anchors: torch.Tensor, grid: tuple[int, int], anchor_t: float) -> set[tuple]:
    """(target, anchor, row, column) by looking at each: a cell learns a centre that lies in it or less than half a cell beside it, along one axis."""
    height, width = grid
    found = set()
    for t, (_, _, cx, cy, w, h) in enumerate(targets.tolist()):
        x, y = cx * width, cy * height
        for a, (aw, ah) in enumerate(anchors.tolist()):
            if max(w * width / aw, aw / (w * width), h * height / ah, ah / (h * height)) >= anchor_t:
                continue
            for row in range(height):
                for column in range(width):
                    beside = [max(column - x, x - column - 1, 0), max(row - y, y - row - 1, 0)]
                    if min(beside) == 0 and max(beside) < 0.5:
                        found.add((t, a, row, column))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_reference_on_random_targets(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(20, 6, generator=generator)
    targets[:, 0], targets[:, 1] = torch.arange(20), 0  # the image number tells which target it was
    targets[:, 4:] = targets[:, 4:] * 0.6 + 0.02
    anchors = torch.rand(3, 3, 2, generator=generator) * 3 + 0.3
    grids = [(8, 12), (4, 6), (2, 3)]
    for level, (m, grid) in enumerate(zip(assign(targets, anchors, grids, 3.0), grids, strict=True)):
        found = list(zip(m.image.tolist(), m.anchor.tolist(), m.row.tolist(), m.column.tolist(), strict=True))
        assert len(found) == len(set(found)), "a cell learns a target once on an anchor"
        assert set(found) == reference(targets, anchors[level], grid, 3.0)
        corner = torch.stack((m.column, m.row), 1)
        cells = torch.tensor((grid[1], grid[0]))
        torch.testing.assert_close((corner + m.cxcywh[:, :2]) / cells, targets[m.image, 2:4])
        torch.testing.assert_close(m.cxcywh[:, 2:] / cells, targets[m.image, 4:])
        assert (m.anchor_wh == anchors[level][m.anchor]).all()
        assert (m.cxcywh[:, :2] >= -0.5).all() and (m.cxcywh[:, :2] <= 1.5).all(), "what 2 s - 0.5 can reach"
