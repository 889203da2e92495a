"""What each row of a network costs, counted beside measured, so that one sees where FLOPs mislead."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.plots.figures import class_color, new_figure, rows_downwards, save_figure

_GFLOPS, _TIME = class_color(1), class_color(0)  # sky blue and vermilion
_BAR = 0.4  # of the distance between two rows
_INCHES = 0.3  # a row


def draw_row_costs(path: Path, rows: Sequence[tuple[str, float, float]], title: str) -> None:
    """A pair of bars for each row, the first row on top: its share of the GFLOPs and of the time.

    Args:
        rows: name, share of GFLOPs, share of time, both 0..1.
    """
    figure = new_figure(8, 1.5 + _INCHES * len(rows))
    axes = figure.add_subplot()
    middle = range(len(rows))
    for offset, column, color, label in ((-_BAR / 2, 1, _GFLOPS, "GFLOPs"), (_BAR / 2, 2, _TIME, "time")):
        bars = axes.barh([y + offset for y in middle], [100 * row[column] for row in rows], _BAR, color=color, label=f"share of {label}")
        axes.bar_label(bars, [f"{100 * row[column]:.1f}" for row in rows], padding=2, fontsize=6)
    axes.margins(x=0.06)
    rows_downwards(axes, [row[0] for row in rows], title, "% of the network")
    save_figure(figure, path)
