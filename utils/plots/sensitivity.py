"""What rounding each layer to int8 costs."""
from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from utils.plots.figures import class_color, new_figure, rows_downwards, save_figure

_INT8, _FLOAT = class_color(1), class_color(0)  # sky blue and vermilion
_INCHES = 0.2  # a layer


def draw_sensitivities(path: Path, found: Sequence[tuple[str, float]], kept: Collection[str], title: str) -> None:
    """A bar for each layer, the first on top: the shorter, the more its rounding disturbs the output.

    Args:
        found: layer, signal to quantization noise of the network's output, dB.
        kept: layers that stayed float, in another colour.
    """
    figure = new_figure(8, 1.5 + _INCHES * len(found))
    axes = figure.add_subplot()
    for color, label, stays in ((_INT8, "int8", False), (_FLOAT, "kept float", True)):
        bars = [(n, sqnr_db) for n, (layer, sqnr_db) in enumerate(found) if (layer in kept) is stays]
        if bars:
            axes.barh([n for n, _ in bars], [sqnr_db for _, sqnr_db in bars], 0.8, color=color, label=label)
    rows_downwards(axes, [layer for layer, _ in found], title, "signal to noise of the network's output, dB", longest=60, fontsize=6)
    save_figure(figure, path)
