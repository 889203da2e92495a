"""A comparison as a spreadsheet, in Markdown, in LaTeX and for the terminal."""
from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.compare.rows import Column, Row, mean_and_std
from utils.files import atomic_write, write_csv

_TEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"})


def text_of(values: Sequence[float], digits: int, plus_minus: str = "±") -> str:
    """Mean, ± standard deviation where there are several; "–" of none."""
    if not values:
        return "–"
    mean, std = mean_and_std(values)
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} {plus_minus} {std:.{digits}f}"


def write_tables(path: Path, rows: Sequence[Row], columns: Sequence[Column], notes: Sequence[str]) -> None:
    """`path` with three endings; `notes` (machine, settings, how it was measured) stand below the Markdown table and above LaTeX's as comments."""
    for ending, text in ((".csv", as_csv(rows, columns)), (".md", as_markdown(rows, columns, notes)), (".tex", as_latex(rows, columns, notes))):
        with atomic_write(path.with_name(path.name + ending)) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_class_ap(path: Path, networks: Sequence[str], classes: Sequence[str], ap: np.ndarray) -> None:
    """mAP50-95 of each class (column) by each network (row); empty where the split has none of it."""
    rows = ([name, *("" if np.isnan(value) else f"{value:.6g}" for value in values)] for name, values in zip(networks, ap, strict=True))
    write_csv(path, ("network", *classes), rows)


def problem_lines(rows: Sequence[Row]) -> list[str]:
    return [f"{row.entrant.name}: {problem}" for row in rows for problem in row.problems]


def as_csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Plain numbers: for each column its mean, for those of several seeds their deviation and number too."""
    several = {column.title for column in columns if any(len(values) > 1 for values in column.values)}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    titles = [f"{column.title}{end}" for column in columns for end in ("", *((" std", " n") if column.title in several else ()))]
    writer.writerow(["network", *titles, "problem"])
    for n, row in enumerate(rows):
        cells = []
        for column in columns:
            mean, std = mean_and_std(column.values[n]) if column.values[n] else ("", "")
            cells += [mean, *(("" if std is None else std, len(column.values[n])) if column.title in several else ())]
        writer.writerow([row.entrant.name, *(f"{c:.6g}" if isinstance(c, float) else c for c in cells), "; ".join(row.problems)])
    return file.getvalue()


def as_markdown(rows: Sequence[Row], columns: Sequence[Column], notes: Sequence[str]) -> str:
    cells = [["network", *(column.title for column in columns)], ["---", *("---:" for _ in columns)]]
    cells += [[row.entrant.name.replace("|", r"\|"), *(text_of(column.values[n], column.digits) for column in columns)] for n, row in enumerate(rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([*lines, "", *(f"- **{line}**" for line in problem_lines(rows)), *(f"- {note}" for note in notes)]) + "\n"


def as_latex(rows: Sequence[Row], columns: Sequence[Column], notes: Sequence[str]) -> str:
    """For the booktabs package."""
    lines = [*(f"% {line}" for line in (*problem_lines(rows), *notes)), rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join(["network", *(column.title.translate(_TEX) for column in columns)]) + r" \\", r"\midrule"]
    for n, row in enumerate(rows):
        cells = [text_of(column.values[n], column.digits, r"$\pm$").replace("–", "--") for column in columns]
        lines.append(" & ".join([row.entrant.name.translate(_TEX), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_text(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """For the terminal, without details."""
    columns = [column for column in columns if not column.detail]
    table = [["network", *(column.title for column in columns)]]
    table += [[row.entrant.name, *(text_of(column.values[n], column.digits) for column in columns)] for n, row in enumerate(rows)]
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True)))
                     for line in table)
