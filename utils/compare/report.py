"""The report of a comparison: tables for the terminal, a spreadsheet, a text and a paper, and the pictures."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.compare.rows import Row, columns_of, mean_and_std, spearman
from utils.compare.scores import sheet_images
from utils.compare.table import as_text, problem_lines, write_class_ap, write_tables
from utils.data.images import ImageError, read_image
from utils.data.labels import Split
from utils.draw import Tile, image_grid, palette
from utils.evaluate.validate import truth_of
from utils.log import info
from utils.plots.comparison import Point, plot_class_ap, plot_learning, plot_pareto

_LINE_PX = 300  # of the sheet, for each network


def write_report(
    folder: Path, name: str, rows: Sequence[Row], splits: Mapping[str, Split], order: Sequence[tuple[str, int]], notes: Sequence[str],
    pictures: bool = True
) -> None:
    """NAME.csv, NAME.md, NAME.tex and the pictures, by measured latency, the fastest first.

    Args:
        order: runtimes and batch sizes as they are asked for; the first that was measured ranks the networks.
    """
    measured = [key for key in order if any(row.profile and key in row.profile.latency for row in rows)]
    rows = sorted(rows, key=lambda row: (row.profile is None, _latency(row, measured)))
    columns = columns_of(rows, list(splits), measured)
    notes = [*notes, *rank_notes(rows, measured)]
    write_tables(folder / name, rows, columns, notes)
    info(f"\n{as_text(rows, columns)}\n" + "\n".join([*problem_lines(rows), *notes]))
    if pictures:
        _draw(folder, rows, splits, measured)


def _latency(row: Row, measured: Sequence[tuple[str, int]]) -> float:
    value = row.profile.p50(*measured[0]) if row.profile and measured else None
    return float("inf") if value is None else value


def rank_notes(rows: Sequence[Row], measured: Sequence[tuple[str, int]]) -> list[str]:
    """How far counted costs mislead: their rank correlation with each measured latency."""
    notes = []
    for runtime, batch in measured:
        known = [(row.profile, ms) for row in rows if row.profile and (ms := row.profile.p50(runtime, batch)) is not None]
        if len(known) > 2:
            times = [ms for _, ms in known]
            gflops, parameters = (spearman([getattr(profile, key) for profile, _ in known], times) for key in ("gflops", "parameters"))
            notes.append(f"rank correlation with the latency in {runtime}, batch {batch}, of {len(known)} networks: GFLOPs {gflops:.2f}, "
                         f"parameters {parameters:.2f} (1: they rank alike)")
    return notes


def _draw(folder: Path, rows: Sequence[Row], splits: Mapping[str, Split], measured: Sequence[tuple[str, int]]) -> None:
    split = "test" if "test" in splits else "val"
    scored = [row for row in rows if any(split in of for of in row.scores.values())]
    if len(scored) > 1:
        plot_pareto(_panels(scored, split, measured), f"{split} mAP50-95", folder / "pareto.png")
    learnt = {row.entrant.name: row.learning.values() for row in rows if row.learning}
    if learnt:
        for column, x, file in ((0, "epoch", "learning.png"), (1, "minutes of training", "learning_by_time.png")):
            plot_learning({name: [(seed[:, column], seed[:, 2]) for seed in seeds] for name, seeds in learnt.items()}, x, folder / file)
    if scored:
        names, ap = [row.entrant.name for row in scored], np.array([row.class_ap(split) for row in scored])
        write_class_ap(folder / "class_ap.csv", names, splits[split].names, ap)
        plot_class_ap(names, splits[split].names, ap, f"{split} AP50-95 by class", folder / "class_ap.png")
        _draw_sheet(folder / "sheet.jpg", scored, splits[split], split)


def _panels(rows: Sequence[Row], split: str, measured: Sequence[tuple[str, int]]) -> dict[str, list[Point]]:
    def points(cost: list[float | None]) -> list[Point]:
        gains = [mean_and_std(row.metric(split, "mAP50-95")) for row in rows]
        return [Point(row.entrant.name, n, c, *gain) for n, (row, c, gain) in enumerate(zip(rows, cost, gains, strict=True)) if c]

    panels = {}
    if measured:
        runtime, batch = measured[0]
        panels[f"latency, ms ({runtime}, batch {batch})"] = points([row.profile.p50(runtime, batch) for row in rows])
    panels["parameters, millions"] = points([row.profile.parameters / 1e6 for row in rows])
    panels["GFLOPs"] = points([row.profile.gflops for row in rows])
    return {title: found for title, found in panels.items() if found}


def _draw_sheet(out: Path, rows: Sequence[Row], split: Split, name: str) -> None:
    """The same images in every line: the truth, then each network's boxes."""
    indices = sheet_images(split)
    try:
        images = [read_image(split.images[i]) for i in indices]
    except ImageError:
        return  # reported when it was read for scoring
    tiles = []
    for image, index in zip(images, indices, strict=True):
        truth = truth_of(split, index)
        tiles.append(Tile(image, truth.xyxy, [""] * len(truth.cls), [palette(int(c)) for c in truth.cls], f"truth: {Path(split.images[index]).name}"))
    for row in rows:
        score = next(of[name] for of in row.scores.values() if name in of)
        for image, boxes in zip(images, score.sheet, strict=True):
            found = np.array(boxes).reshape(-1, 6)
            tiles.append(Tile(image, found[:, :4], [f"{conf:.2f}" for conf in found[:, 4]], [palette(int(c)) for c in found[:, 5]], row.entrant.name))
    image_grid(tiles, out, columns=len(images), max_tiles=len(tiles), max_size=max(_LINE_PX * (len(rows) + 1), 2000))
