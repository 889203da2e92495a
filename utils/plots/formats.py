"""A network's formats side by side: a panel for each figure, a bar for each format."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.plots.figures import INK, class_color, new_figure, plain, save_figure, tidy

_INCHES = 0.34  # a format
_LETTER = 0.072  # inches


def draw_formats(path: Path, names: Sequence[str], figures: Mapping[str, Sequence[float | None]], title: str) -> None:
    """Bars with their values, the first format on top; a figure that is known of no format has no panel.

    Args:
        figures: what is measured -> its value for each format, None where it is not known.
    """
    shown = {what: values for what, values in figures.items() if any(value is not None for value in values)}
    figure = new_figure(_LETTER * max(map(len, names)) + 2.5 * len(shown), 1.2 + _INCHES * len(names))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for color, axes, (what, values) in zip(map(class_color, range(len(shown))), panels, shown.items(), strict=True):
        known = [(n, value) for n, value in enumerate(values) if value is not None]
        axes.barh([n for n, _ in known], [value for _, value in known], 0.7, color=color)
        most = max(value for _, value in known) or 1
        for n, value in known:
            axes.text(value + 0.02 * most, n, f"{value:.3g}", va="center", fontsize=8, color=INK)
        tidy(axes, "", what)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.22 * most)
        axes.set_ylim(len(names) - 0.4, -0.6)
    panels[0].set_yticks(range(len(names)), [plain(name, 60) for name in names], fontsize=8)
    figure.suptitle(plain(title, 120), fontsize=11, color=INK)
    save_figure(figure, path)
