"""Pictures of a validation: precision against recall, the metrics against confidence, the confusion matrix."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from utils.evaluate.curves import Curves
from utils.plots.figures import FAINT, INK, class_color, new_figure, plain, save_figure, tidy

_ALL_NAMED = 20  # up to so many classes each has a colour and a name
_EXTREMES = 5  # beyond that, so many of the best and of the worst have
_NUMBERS = 30  # up to so many classes the confusion matrix shows numbers


def plot_pr_curve(curves: Curves, names: Sequence[str], out: Path) -> None:
    """Precision against recall of each class and their mean; the legend gives AP at the IoU that `curves` was made with."""
    figure = new_figure(9, 6)
    axes = figure.add_subplot()
    _plot_classes(axes, curves.pr_recall, curves.pr_precision, curves.ap50, curves.classes, names)
    mean = curves.mean(curves.pr_precision)
    axes.plot(curves.pr_recall, mean, color=INK, linewidth=3, label=f"all classes  {curves.mean(curves.ap50):.3f}")
    _finish(axes, "Precision against recall", "recall", "precision", "AP50", curves)
    save_figure(figure, out)


def plot_metric_curve(curves: Curves, metric: Literal["precision", "recall", "f1"], names: Sequence[str], out: Path) -> None:
    """One metric against the confidence threshold; the legend gives its value at the best confidence, marked by the dashed line."""
    values: np.ndarray = getattr(curves, metric)
    at_best: np.ndarray = getattr(curves, f"{metric}_at_best")
    word = "F1" if metric == "f1" else metric
    figure = new_figure(9, 6)
    axes = figure.add_subplot()
    _plot_classes(axes, curves.conf, values, at_best, curves.classes, names)
    axes.plot(curves.conf, curves.mean(values), color=INK, linewidth=3, label=f"all classes  {curves.mean(at_best):.3f}")
    axes.axvline(curves.best_conf, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
    title = f"{word[0].upper()}{word[1:]} against confidence"
    _finish(axes, title, "confidence threshold", word, f"{word} at {curves.best_conf:.3f}", curves)
    save_figure(figure, out)


def _plot_classes(axes: Axes, x: np.ndarray, y: np.ndarray, score: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> None:
    """A line for each class with truth, named in falling score; of many classes the middle ones stay grey and unnamed."""
    ranked = classes[np.argsort(-score[classes], kind="stable")]
    named = ranked if len(ranked) <= _ALL_NAMED else np.concatenate((ranked[:_EXTREMES], ranked[-_EXTREMES:]))
    for k in np.setdiff1d(ranked, named):
        axes.plot(x, y[k], color=FAINT, linewidth=0.6, alpha=0.7)
    for i, k in enumerate(named):
        few = len(named) == len(ranked)
        style = "-" if few or i < _EXTREMES else (0, (5, 1.5))
        color = class_color(k if few else i % _EXTREMES)
        axes.plot(x, y[k], color=color, linestyle=style, linewidth=1.4, label=f"{plain(names[k])}  {score[k]:.3f}")


def _finish(axes: Axes, title: str, x: str, y: str, legend: str, curves: Curves) -> None:
    tidy(axes, title, x, y)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    handles, labels = axes.get_legend_handles_labels()
    named = len(handles) - 1
    note = f"\nbest and worst {_EXTREMES} of {len(curves.classes)}" if named < len(curves.classes) else ""
    axes.legend(
        [handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]], title=legend + note, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False,
        fontsize=9, title_fontsize=9, alignment="left",
    )  # fmt: skip


def plot_confusion(matrix: np.ndarray, names: Sequence[str], out: Path) -> None:
    """What each true class (column) was predicted as (row), in shares of the column.

    Args:
        matrix: (C + 1, C + 1) counts, the last row and column background, as `confusion_matrix` gives it.
        names: C.
    """
    total = matrix.sum(0, keepdims=True)
    share = np.where(total > 0, matrix / np.maximum(total, 1), np.nan)
    n = len(matrix)
    few = n - 1 <= _NUMBERS
    side = float(np.clip((0.45 if few else 0.14) * n, 6, 16))
    figure = new_figure(side, side)
    axes = figure.add_subplot(aspect="equal")
    axes.set_facecolor("#f3f3f3")  # shows where a class has no truth, and for zero
    middle = np.arange(n)
    shown = np.ma.masked_invalid(np.where(share > 0, share, np.nan))
    drawn = axes.pcolormesh(middle, middle, shown, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.8 if few else 0.3)
    axes.invert_yaxis()
    if few:
        for row, column in zip(*np.nonzero(np.nan_to_num(share) >= 0.005), strict=True):
            value = share[row, column]
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.55 else INK)
    labels = [*(plain(name, 16) for name in names), "background"]
    size = 9 if few else 6
    axes.set_xticks(middle, labels, rotation=90 if max(map(len, labels)) * n > 60 else 0, fontsize=size)
    axes.set_yticks(middle, labels, fontsize=size)
    axes.tick_params(length=0)
    axes.axhline(n - 1.5, color=INK, linewidth=0.8)
    axes.axvline(n - 1.5, color=INK, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.set_title("Confusion, shares of each true class", fontsize=11, color=INK)
    axes.set_xlabel("true (background: false alarms)")
    axes.set_ylabel("predicted (background: missed)")
    figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.02, shrink=0.5).outline.set_visible(False)
    save_figure(figure, out)
