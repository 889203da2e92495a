"""What every Matplotlib picture here shares. Figures are plain objects drawn by Agg: no pyplot, no display, no state kept."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.draw import palette
from utils.files import atomic_write

INK, FAINT = "#222222", "#bbbbbb"
_DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """Inches; the parts are laid out without overlap."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Figure, out: Path) -> None:
    """Write the figure, atomically, in the format that the name's suffix says."""
    with atomic_write(Path(out)) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script without a font here: boxes stand for it
        figure.savefig(temporary, dpi=_DPI, bbox_inches="tight", pad_inches=0.12)


def tidy(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Names, a light grid and no frame but the two axes."""
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def rows_downwards(axes: Axes, names: Sequence[str], title: str, x: str, *, longest: int = 24, fontsize: float = 8) -> None:
    """Horizontal bars' frame: the first name on top, no lines across the bars; the figure's legend below."""
    axes.set_yticks(range(len(names)), [plain(name, longest) for name in names], fontsize=fontsize)
    tidy(axes, plain(title, 120), x)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)


def class_color(i: int) -> tuple[float, float, float]:
    """The class's colour in `images`, as Matplotlib wants it: RGB, 0 … 1; light ones darker, so that thin lines show on white."""
    blue, green, red = palette(i)
    luminance = (0.114 * blue + 0.587 * green + 0.299 * red) / 255
    scale = min(1, 0.7 / luminance) / 255
    return red * scale, green * scale, blue * scale


def plain(name: str, longest: int = 24) -> str:
    """A class name that Matplotlib neither reads as a formula nor hides from a legend, cut to `longest` letters."""
    name = name if len(name) <= longest else name[: longest - 1] + "…"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")
