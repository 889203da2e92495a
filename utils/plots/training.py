"""Pictures of a training: the labels it learns from, and losses and metrics by epoch."""
from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from utils.errors import UserError
from utils.plots.figures import INK, class_color, new_figure, plain, save_figure, tidy

# panel -> its columns in results.csv
_PANELS = {
    "box loss": ("train/box_loss", "val/box_loss"),
    "objectness loss": ("train/obj_loss", "val/obj_loss"),
    "class loss": ("train/cls_loss", "val/cls_loss"),
    "distillation loss": ("train/distill_loss",),
    "feature distillation loss": ("train/features_loss",),
    "precision and recall": ("metrics/precision", "metrics/recall"),
    "mAP": ("metrics/mAP_0.5", "metrics/mAP_0.5:0.95"),
    "learning rate": ("x/lr0", "x/lr1"),
}

_RATES = {"lr0": "biases", "lr1": "weights, norms"}


def plot_results(results: Path, out: Path) -> None:
    """Losses, metrics and learning rate by epoch: points as logged, lines smoothed, a star at each metric's best epoch.

    Columns that are missing or hold no number are left out.

    Raises:
        UserError: no such file, or no panel has a number.
    """
    columns = read_results(results)
    panels = {title: [key for key in keys if np.isfinite(columns.get(key, np.nan)).any()] for title, keys in _PANELS.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:
        raise UserError(f"{results}: nothing to plot: no row with numbers under {', '.join(k for keys in _PANELS.values() for k in keys)}")
    row = np.arange(len(next(iter(columns.values()))), dtype=float)
    epoch = columns.get("epoch", row)
    epoch = epoch if np.isfinite(epoch).all() else row
    wide = min(len(panels), 3)
    figure = new_figure(4.4 * wide, 3.3 * -(-len(panels) // wide))
    for i, (title, keys) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // wide), wide, i + 1)
        for key, color in zip(keys, ((0x1F, 0x77, 0xB4), (0xE0, 0x6A, 0x00)), strict=False):
            _plot_series(axes, epoch, columns[key], key, tuple(c / 255 for c in color))
        tidy(axes, title, "epoch")
        axes.set_xlim(epoch.min() - 0.5, epoch.max() + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if keys[0].startswith("metrics/"):
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, out)


def plot_gammas(histograms: np.ndarray, bins: np.ndarray, out: Path) -> None:
    """Network slimming's batch-norm scales by epoch: how many have which size.

    Args:
        histograms: (epochs, bins) counts.
        bins: (bins + 1,) edges; the last bin holds all larger ones too.
    """
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    share = 100 * histograms / histograms.sum(1, keepdims=True)
    mesh = axes.pcolormesh(np.arange(len(histograms) + 1) + 0.5, bins, share.T, norm=LogNorm(max(share[share > 0].min(), 0.01), 100), cmap="viridis")
    tidy(axes, "", "epoch", "size of batch-norm scales")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.colorbar(mesh, ax=axes, label="% of the scales")
    save_figure(figure, out)


def _plot_series(axes: Axes, epoch: np.ndarray, values: np.ndarray, key: str, color: tuple[float, ...]) -> None:
    known = np.isfinite(values)
    epoch, values = epoch[known], values[known]
    group, _, name = key.rpartition("/")
    axes.plot(epoch, values, ".", color=color, markersize=4, alpha=0.35 if len(values) > 5 else 1)
    label = name if group == "metrics" else _RATES.get(name, group)
    if group == "metrics":
        best = int(values.argmax())
        label = f"{label}, best {values[best]:.3f} at {epoch[best]:g}"
        axes.plot(epoch[best], values[best], "*", color=color, markersize=11, markeredgecolor="white")
    axes.plot(epoch, values if name in _RATES else smooth(values), color=color, linewidth=1.8, label=label)


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian moving average of (N,), about a fiftieth of it wide; at the ends over what is there."""
    distance = np.arange(len(values))[:, None] - np.arange(len(values))
    weight = np.exp(-0.5 * (distance / max(len(values) / 50, 0.3)) ** 2)
    return weight @ values / weight.sum(1)


def read_results(path: Path) -> dict[str, np.ndarray]:
    """The columns of a results.csv: name -> (rows,) floats, nan where a cell is no number.

    Raises:
        UserError: no such file, or no table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as results of a training: {error}") from None
    names = [name for name in (rows[0] if rows else ()) if name]
    return {name.strip(): np.array([_number(row.get(name)) for row in rows]) for name in names}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def plot_labels(labels: Sequence[np.ndarray], names: Sequence[str], out: Path) -> None:
    """How the boxes of a data set are spread: over classes, place, size, and images.

    Args:
        labels: one for each image, (n, 5): class, then centre and size divided by the image's size.
        names: of all classes.
    """
    boxes = np.concatenate([np.reshape(rows, (-1, 5)) for rows in labels] or [np.zeros((0, 5))])
    figure = new_figure(12, 9)
    by_class, place, size, crowd = (figure.add_subplot(2, 2, i) for i in range(1, 5))
    _plot_class_counts(by_class, np.bincount(boxes[:, 0].astype(int), minlength=len(names)), names)

    _plot_density(place, boxes[:, 1], boxes[:, 2])
    place.invert_yaxis()
    tidy(place, "box centres, shares of the image", "x", "y")
    _plot_density(size, boxes[:, 3], boxes[:, 4])
    tidy(size, "box sizes, shares of the image", "width", "height")

    per_image = np.array([len(rows) for rows in labels], int)
    most = int(per_image.max(initial=0))
    crowd.hist(per_image, bins=np.linspace(-0.5, most + 0.5, min(most + 2, 52)), color="#4c78a8", edgecolor="white", linewidth=0.4)
    tidy(crowd, f"boxes in an image: {len(boxes):,} in {len(labels):,} images, {int((per_image == 0).sum()):,} without", "boxes", "images")
    save_figure(figure, out)


def _plot_class_counts(axes: Axes, count: np.ndarray, names: Sequence[str]) -> None:
    bars = axes.bar(range(len(count)), count, color=[class_color(k) for k in range(len(count))], width=0.85)
    few = len(names) <= 30
    if few:
        axes.bar_label(bars, [f"{n:,}" for n in count], fontsize=7, color=INK)
    upright = len(names) > 8 or max(map(len, names), default=0) * len(names) > 60
    ticks = [plain(name, 16) for name in names]
    axes.set_xticks(range(len(names)), ticks, rotation=90 if upright else 0, fontsize=8 if few else 5)
    tidy(axes, f"boxes of {len(names)} classes", "", "boxes")
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)


def _plot_density(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Points of the unit square, counted in a grid; dark is many, on a logarithmic scale. Nothing for no points."""
    if len(x):
        bins = int(np.clip(np.sqrt(len(x)) / 1.2, 10, 80))
        axes.hist2d(x, y, bins=bins, range=((0, 1), (0, 1)), cmap="Blues", norm=LogNorm(vmin=0.5), cmin=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
