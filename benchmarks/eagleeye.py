"""What EagleEye's score foretells: rank correlation of candidates' scores, norms re-estimated or not, with their mAP after a fine-tune.

    python prune.py --weights best.pt --data bccd.yaml --target-flops 0.5 --candidates 100 --name search
    python -m benchmarks.eagleeye --search runs/prune/search --weights best.pt --data bccd.yaml --count 8 --epochs 30

Candidates are taken evenly from the best to the worst. Their networks and trainings lie in the search's folder, below fine-tuned/; begun again, it
goes on. The mAP is that of the last epoch, on the val split.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.prune import channel_graph, remove_channels
from models.weights import open_checkpoint
from utils.compare.rows import spearman
from utils.compress.plan import best_of
from utils.compress.pruning import Pruning, digest, open_slices
from utils.compress.report import save_pruned
from utils.config import PruneConfig
from utils.data.open import open_splits
from utils.device import machine
from utils.files import ROOT


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", type=Path, required=True, help="prune.py's folder")
    parser.add_argument("--weights", required=True, help="of the network that it searched")
    parser.add_argument("--data", required=True)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=8)
    return parser.parse_args(argv)


def open_pruning(args: argparse.Namespace, settings: dict[str, float]) -> Pruning:
    """As the search had it."""
    target = next(name for name in ("flops", "params", "latency") if f"target-{name}" in settings)
    config = PruneConfig(
        weights=args.weights, data=args.data, seed=settings["seed"], calib=settings["calib"], held_out=settings["held-out"],
        imgsz=settings["imgsz"], min_ratio=settings["min-ratio"], round_to=settings["round-to"], **{f"target_{target}": settings[f"target-{target}"]})
    (split,) = open_splits(config, ("train",))
    model = open_checkpoint(args.weights).model.to(memory_format=torch.channels_last)
    slices = open_slices(split, config, config.imgsz, model.pad_stride)
    pruning = Pruning(config, model, channel_graph(model, config.imgsz), remove_channels, slices, lambda keep: 0.0)
    if (digest(model.state_dict()), slices.held_out_split.fingerprint) != (settings["weights"], settings["data"]):
        raise SystemExit(f"{args.search}: was made with other --weights or --data")
    return pruning


def fine_tuned(args: argparse.Namespace, pruned: Path) -> float:
    """mAP50-95 after the training of a pruned network, which goes on where it stopped."""
    folder = pruned.parent / f"run-{args.epochs}"
    last = folder / "weights" / "last.pt"
    if len(results(folder)) < args.epochs:
        flags = ["--resume", last] if last.exists() else [
            "--weights", pruned, "--data", args.data, "--epochs", args.epochs, "--patience", 0, "--project", folder.parent, "--name", folder.name,
            "--exist-ok", "--noplots"]
        subprocess.run([sys.executable, ROOT / "train.py", "--workers", str(args.workers), *map(str, flags)], check=True, stdout=subprocess.DEVNULL)
    return float(results(folder)[-1]["metrics/mAP_0.5:0.95"])


def results(folder: Path) -> list[dict[str, str]]:
    file = folder / "results.csv"
    return list(csv.DictReader(file.open(newline=""))) if file.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    content = json.loads((args.search / "candidates.json").read_text(encoding="utf-8"))
    ranked = sorted(content["candidates"], key=lambda candidate: (-candidate["score"], candidate["number"]))
    pruning = open_pruning(args, content["settings"])
    rows = []
    for place in np.linspace(0, len(ranked) - 1, args.count).round().astype(int):
        candidate = ranked[place]
        with torch.no_grad():
            keep = best_of(pruning.graph, candidate["plan"], pruning.scores)
            raw = pruning.score(remove_channels(pruning.model, pruning.graph, keep))
        name = hashlib.sha256(json.dumps(candidate["plan"]).encode()).hexdigest()[:8]  # not its number alone: a search may be begun anew
        pruned = args.search / "fine-tuned" / f"{candidate['number']}-{name}" / "pruned.pt"
        if not pruned.exists():
            pruned.parent.mkdir(parents=True, exist_ok=True)
            save_pruned(pruned, pruning.left(candidate["plan"]), pruning.slices.imgsz)
        rows.append((candidate["number"], candidate["score"], raw, fine_tuned(args, pruned)))
        print("candidate {}: score {:.4f}, without re-estimation {:.4f}, fine-tuned {:.4f}".format(*rows[-1]), flush=True)
    numbers, scores, raws, tuned = zip(*rows, strict=True)
    print(f"{machine(torch.device('cpu'))}; {len(numbers)} of {len(ranked)} candidates, {args.epochs} epochs\n"
          f"rank correlation with the fine-tuned mAP: {spearman(scores, tuned):.2f} re-estimated, {spearman(raws, tuned):.2f} as they were")
    return 0


if __name__ == "__main__":
    sys.exit(main())
