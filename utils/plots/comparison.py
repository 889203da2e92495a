"""Pictures of a comparison: accuracy against cost with the Pareto front, learning curves, AP by class, the same images by every network."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from utils.plots.figures import FAINT, INK, class_color, new_figure, plain, save_figure, tidy
from utils.plots.training import smooth

_LETTER = 4.7  # points, the width of a letter of a name, and half of its height with the room around it

Box = tuple[float, float, float, float]  # left, bottom, right, top


class Point(NamedTuple):
    """A network in a plane of accuracy against cost."""

    name: str
    color: int  # its place among the networks, the same in every panel
    cost: float
    gain: float
    gain_std: float | None = None


def pareto_front(cost: Sequence[float], gain: Sequence[float]) -> list[int]:
    """Indices of those that no other beats in both, cheapest first: less cost, more gain."""
    front: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -gain[i])):
        if not front or gain[i] > gain[front[-1]]:
            front.append(i)
    return front


def plot_pareto(panels: Mapping[str, Sequence[Point]], gain: str, out: Path) -> None:
    """A panel for each cost (its title says the unit): every network named, those that no other beats in both joined by the front."""
    figure = new_figure(6.2 * len(panels), 5)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for n, (title, points) in enumerate(panels.items()):
        _plot_points(axes[n], points)
        tidy(axes[n], "", title, "" if n else gain)
    figure.canvas.draw()  # lays the panels out, which pixels are counted from
    for panel, points in zip(axes, panels.values(), strict=True):
        _name_points(panel, points)
    save_figure(figure, out)


def _front(points: Sequence[Point]) -> list[int]:
    return pareto_front([p.cost for p in points], [p.gain for p in points])


def _plot_points(axes: Axes, points: Sequence[Point]) -> None:
    front = [points[i] for i in _front(points)]
    axes.step([p.cost for p in front], [p.gain for p in front], where="post", color=FAINT, linewidth=1.6, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.2, y=0.15)
    for point in points:
        axes.errorbar(point.cost, point.gain, yerr=point.gain_std, fmt="o", color=class_color(point.color), markersize=8 if point in front else 6,
                      capsize=3, zorder=3, markeredgecolor="white")


def _name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside the points, each at the first of some places where it covers neither a point nor a name, else where it covers least; those of the
    front are bold."""
    front, per_point = set(_front(points)), axes.figure.dpi / 72
    spots = axes.transData.transform([(p.cost, p.gain) for p in points]) / per_point  # in points, as letters are
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    area = axes.get_window_extent().extents / per_point
    for i in np.argsort(-spots[:, 1]):
        (x, y), name = spots[i], plain(points[i].name, 40)
        wide = _LETTER * len(name) * (1.1 if i in front else 1)
        boxes = {(dx, dy): (x + dx, y + dy - _LETTER, x + dx + wide, y + dy + _LETTER) for dx, dy in _places(wide)}
        (dx, dy), box = min(boxes.items(), key=lambda place: _covered(place[1], area, taken))  # the first of equals
        taken.append(box)
        axes.annotate(
            name, (points[i].cost, points[i].gain), (dx, dy), textcoords="offset points", fontsize=8, color=INK, va="center",
            fontweight="bold" if i in front else "normal", bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.4},
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4} if abs(dy) > 12 else None,
        ).set_in_layout(False)  # fmt: skip


def _covered(box: Box, area: Box, taken: Sequence[Box]) -> tuple[float, float]:
    """How much of a box lies outside of the area, and how much of it on others."""
    width, height = box[2] - box[0], box[3] - box[1]
    return width * height - _shared(box, area), sum(_shared(box, other) for other in taken)


def _shared(a: Box, b: Box) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _places(wide: float) -> list[tuple[float, float]]:
    """Offsets of a name's left end from its point, in points, nearest first."""
    near = [(8, 0), (-8 - wide, 0)]
    return near + [(dx, sign * dy) for dy in (11, 20, 30, 42, 56, 72) for sign in (1, -1) for dx in (8, -8 - wide, -wide / 2)]


def plot_learning(curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], x: str, out: Path) -> None:
    """mAP while training: a line for each network, its seeds' mean where they share their x, and each seed faintly.

    Args:
        curves: network -> for each seed x (n,) and mAP (n,).
    """
    figure = new_figure(9, max(5.5, 0.19 * len(curves) + 0.5))
    axes = figure.add_subplot()
    for i, (name, seeds) in enumerate(curves.items()):
        color = class_color(i)
        for at, value in seeds:
            axes.plot(at, value, color=color, linewidth=0.8, alpha=0.35)
        shortest = min(len(at) for at, _ in seeds)
        mean = np.mean([value[:shortest] for _, value in seeds], 0)
        best = max(float(value.max()) for _, value in seeds)
        label = f"{plain(name, 40)}  best {best:.3f}"
        axes.plot(np.mean([at[:shortest] for at, _ in seeds], 0), smooth(mean), color=color, linewidth=1.8, label=label)
    tidy(axes, "val mAP50-95 while training, smoothed (as logged: thin)", x, "mAP50-95")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    save_figure(figure, out)


def plot_class_ap(names: Sequence[str], classes: Sequence[str], ap: np.ndarray, title: str, out: Path) -> None:
    """AP of each class (column) by each network (row); ap (N, C), nan where there is no truth."""
    wide, few = min(max(0.5 * len(classes), 4), 24), len(classes) <= 30
    figure = new_figure(wide + 3, 0.42 * len(names) + 1.4)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")  # where there is no truth
    shown = axes.imshow(np.ma.masked_invalid(ap), cmap="Blues", vmin=0, vmax=max(float(np.nanmax(ap, initial=0)), 0.01), aspect="auto")
    if not few:
        figure.colorbar(shown, ax=axes, pad=0.01)
    for (row, column), value in np.ndenumerate(ap) if few else ():
        if np.isfinite(value):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 * shown.get_clim()[1] else INK)
    axes.set_xticks(range(len(classes)), [plain(c, 16) for c in classes], rotation=90 if len(classes) > 6 else 0, fontsize=8 if few else 6)
    axes.set_yticks(range(len(names)), [plain(n, 40) for n in names], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11, color=INK)
    save_figure(figure, out)
