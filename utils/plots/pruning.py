"""Pictures of a pruning: what each layer keeps, and the candidates of a search."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.plots.figures import FAINT, INK, class_color, new_figure, plain, rows_downwards, save_figure, tidy

_INCHES = 0.17  # a layer
_LEAST_SPAN = 2.0  # % of the FLOPs


def draw_widths(path: Path, layers: Sequence[tuple[str, int, int]], title: str) -> None:
    """A bar for each group of layers, the first on top: its channels before, and those that stay.

    Args:
        layers: name, channels before and after.
    """
    figure = new_figure(8, 1.5 + _INCHES * len(layers))
    axes = figure.add_subplot()
    places = range(len(layers))
    bars = axes.barh(places, [before for _, before, _ in layers], color=FAINT, label="before")
    axes.barh(places, [after for *_, after in layers], color=class_color(1), label="after")
    axes.bar_label(bars, [f" {after} of {before}" for _, before, after in layers], fontsize=5.5, color=INK)
    axes.margins(x=0.1)
    rows_downwards(axes, [name for name, *_ in layers], title, "channels", longest=48, fontsize=6)
    save_figure(figure, path)


def draw_candidates(path: Path, points: Sequence[tuple[float, float, float]], title: str) -> None:
    """A point for each candidate, against the FLOPs, which the budget makes alike, and the parameters; the best one marked.

    Args:
        points: shares of the FLOPs and the parameters, and score; the best first.
    """
    figure = new_figure(9, 4.2)
    scores = [score for *_, score in points]
    for n, (axes, what) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("FLOPs", "parameters"), strict=True)):
        shares = [100 * point[n] for point in points]
        axes.scatter(shares, scores, s=18, color=class_color(1), edgecolor="white", linewidth=0.5)
        axes.scatter(shares[:1], scores[:1], s=120, marker="*", color=class_color(0), label=f"best: {scores[0]:.4f}", zorder=3)
        tidy(axes, "", f"% of the {what}", "" if n else "mAP50-95 on the held-out slice")
        axes.margins(0.1)
        low, high = axes.get_xlim()
        if (short := _LEAST_SPAN - (high - low)) > 0:  # the last digits would say what they don't mean
            axes.set_xlim(low - short / 2, high + short / 2)
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle(plain(title, 120), fontsize=11, color=INK)
    save_figure(figure, path)
