"""Train networks on the same data, seeds and schedule, and see what each reaches and what it really costs on this machine.

    python compare.py --cfg 'models/*.yaml'
    python compare.py --cfg yolov5s.yaml yolov5s-ghost.yaml yolov5s-shuffle.yaml --data bccd.yaml --imgsz 320 --epochs 100 --seeds 0 1 2
    python compare.py --weights runs/train/a/weights/best.pt runs/train/b/weights/best.pt --data bccd.yaml --imgsz 320
    python compare.py --cfg yolov5s-ghost.yaml --layers
    python compare.py --formats runs/train/exp/weights/best.pt --data bccd.yaml

Exit code 1: some network or format failed in some way, which the table names; the others are done.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from utils.config import CompareConfig
from utils.errors import script
from utils.flags import parse
from utils.threads import wait_politely


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(CompareConfig, argv, "Compare networks: accuracy, size, counted cost and measured cost.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    from models import profile
    from models.plugin import load_plugin
    from models.weights import open_weights
    from utils.compare.comparison import Comparison
    from utils.compare.entrants import find_entrants, image_size
    from utils.compare.formats import FormatComparison
    from utils.cpu import keep_freed_memory
    from utils.log import info

    keep_freed_memory()
    load_plugin(config.plugin)
    if config.formats:
        comparison = FormatComparison(config, open_weights)
    else:
        entrants = find_entrants(config.cfg, config.weights)
        comparison = Comparison(dataclasses.replace(config, imgsz=image_size(config, entrants)), entrants, profile)
    comparison.run()
    info(f"results: {comparison.folder}")
    return 1 if comparison.failed else 0


if __name__ == "__main__":
    sys.exit(main())
