"""Remove channels of a trained network; what is left trains, validates, detects, is compared and pruned again like any other.

    python prune.py --weights best.pt --data bccd.yaml --target-flops 0.5
    python prune.py --weights best.pt --data bccd.yaml --plan runs/prune/exp/plans/2.yaml
    python prune.py --weights best.pt --method l1 --ratio 0.3
    python train.py --weights runs/prune/exp/pruned.pt --data bccd.yaml --epochs 50

A search that was interrupted goes on with the same command, --exist-ok and its folder's --name. pruned.yaml beside pruned.pt has the same widths
without the weights: train.py --cfg trains them from scratch.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.config import DEFAULT_IMGSZ, CompareConfig, PruneConfig, for_next, quoted
from utils.errors import UserError, script
from utils.flags import parse
from utils.threads import wait_politely

_PRUNED = "pruned.pt"


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(PruneConfig, argv, "Remove channels of a trained network.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    import torch

    from models import profile
    from models.plugin import load_plugin
    from models.prune import channel_graph, latency_share, remove_channels
    from models.weights import open_checkpoint
    from utils.compare.comparison import Comparison
    from utils.compare.entrants import Entrant
    from utils.compress.pruning import Pruning, check_settings, open_slices
    from utils.compress.report import report, save_pruned
    from utils.cpu import keep_freed_memory
    from utils.data.open import open_splits
    from utils.device import select_device
    from utils.evaluate.validate import check_classes
    from utils.files import discarded_if_refused, new_run_dir
    from utils.log import info

    check_settings(config)
    keep_freed_memory()
    device = select_device(config.device)
    load_plugin(config.plugin)
    weights, model, trained_at, _ = open_checkpoint(config.weights)
    config = dataclasses.replace(config, weights=str(weights))
    _check_folder(config)
    model.to(device, memory_format=torch.channels_last)
    imgsz = model.whole_strides(config.imgsz or trained_at or DEFAULT_IMGSZ)
    slices = None
    if config.data:
        split, _ = open_splits(config, ("train", "val"))  # val for the comparison in the end
        check_classes(model.names, split.names, config.single_cls, config.weights)
        slices = open_slices(split, config, imgsz, model.pad_stride)
    graph = channel_graph(model, imgsz)
    pruning = Pruning(config, model, graph, remove_channels, slices, latency_share(model, graph, imgsz))
    is_new = not (config.exist_ok and (Path(config.project).expanduser() / config.name).exists())
    folder = new_run_dir(config.project, config.name, config.exist_ok)
    whole, pruned = Entrant("before", weights=config.weights), Entrant("pruned", weights=str(folder / _PRUNED))
    costs = CompareConfig(weights=(whole.weights, pruned.weights), data=config.data, data_root=config.data_root, imgsz=imgsz, batches=(1,),
                          runtimes=("PyTorch fp32",), device=config.device, precision=config.precision, workers=config.workers,
                          single_cls=config.single_cls, noplots=config.noplots, project=str(folder), name="comparison")
    comparison = Comparison(costs, [whole, pruned], profile)  # refuses another comparison's folder before anything in it is replaced
    with discarded_if_refused(folder, (costs.name,) if is_new else ()):
        plan, left = pruning.run(folder)
    save_pruned(folder / _PRUNED, left, imgsz)
    report(pruning, plan, folder)
    comparison.run()
    info(f"weights: {folder / _PRUNED}; next: python train.py --weights {quoted(folder / _PRUNED)} "
         f"--data {quoted(config.data or 'DATA.yaml')} --epochs 50{for_next(config)}")
    if config.data:
        info(f"    and then before, pruned and fine-tuned side by side: python compare.py --weights {quoted(config.weights)} "
             f"{quoted(folder / _PRUNED)} TUNED/weights/best.pt --data {quoted(config.data)} --imgsz {imgsz}{for_next(config)}")
    return 1 if comparison.failed else 0


def _check_folder(config: PruneConfig) -> None:
    """What is pruned is never overwritten."""
    written = Path(config.project).expanduser() / config.name / _PRUNED
    if config.exist_ok and written.exists() and written.samefile(config.weights):
        raise UserError(f"{written}: would be overwritten by what is left of it: give another --name")


if __name__ == "__main__":
    sys.exit(main())
