"""What a pruning did, in words, in a file and in pictures."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.checkpoint import Checkpoint, for_inference, save_checkpoint
from utils.compress.plan import Plan, best_of
from utils.compress.pruning import Pruning
from utils.files import atomic_write, write_csv
from utils.log import info
from utils.plots.pruning import draw_candidates, draw_widths


def save_pruned(path: Path, model: Any, imgsz: int) -> None:
    """As best.pt is: fp16, for inference and as the start of a training; and beside it as a YAML, to train the same widths from scratch."""
    save_checkpoint(path, Checkpoint(model.spec.to_dict(), model.names, for_inference(model.state_dict()), imgsz=imgsz))
    with atomic_write(path.with_suffix(".yaml")) as temporary:
        temporary.write_text(model.spec.to_yaml(), encoding="utf-8")


def report(pruning: Pruning, plan: Plan, folder: Path) -> None:
    """widths.csv, the pictures, and the names of what stays whole."""
    graph = pruning.graph
    kept = best_of(graph, plan, pruning.scores)  # here and there a channel more than planned: no layer is left with none
    layers = [(_short(group.name), len(group.channels), int(kept[group.channels].sum())) for group in graph.groups]
    shared = [" ".join(map(_short, group.layers[1:])) for group in graph.groups]
    rows = [(name, others, before, after, "") for (name, before, after), others in zip(layers, shared, strict=True)]
    rows += [(_short(key), "", outputs, outputs, "whole") for key, outputs in graph.whole.items()]
    write_csv(folder / "widths.csv", ("layer", "layers that share its channels", "channels before", "channels after", "kept"), rows)
    shares = ", ".join(f"{100 * pruning.costs[name](plan):.1f} % of the {name}" for name in ("flops", "params"))
    before, after = sum(n for _, n, _ in layers), sum(n for *_, n in layers)
    info(f"{after} of {before} channels in {len(layers)} groups of layers stay: {shares}")
    if graph.kept_whole:
        whole = ", ".join(f"{module.removeprefix('model.')} ({operation})" for module, operation in graph.kept_whole.items())
        info(f"kept whole, as what these layers do needs every channel that they see: {whole}; widths.csv names every layer that is whole")
    if not pruning.config.noplots:
        draw_widths(folder / "widths.png", layers, f"{pruning.config.weights} by {pruning.config.method}: {shares}")
        if pruning.candidates:
            points = [(candidate.costs["flops"], candidate.costs["params"], candidate.score) for candidate in pruning.candidates]
            draw_candidates(folder / "candidates.png", points, f"{len(points)} candidates of {pruning.config.weights}")


def _short(key: str) -> str:
    return key.removeprefix("model.").removesuffix(".weight")
