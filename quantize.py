"""Make an int8 file of a checkpoint, and say what it costs: mAP, size and latency of float and int8, measured on the same images.

    python quantize.py --weights runs/train/exp/weights/best.pt --data bccd.yaml --to openvino
    python quantize.py --weights runs/train/exp/weights/best.pt --data bccd.yaml --to onnx --max-drop 0.5 --sensitivity

Exit code 1: int8 loses more than --max-drop whatever stays float; the file is kept aside under another name.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from utils.config import QuantizeConfig
from utils.errors import script
from utils.flags import parse
from utils.threads import wait_politely


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(QuantizeConfig, argv, "Make an int8 file of a checkpoint.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    from models.plugin import load_plugin
    from models.weights import open_checkpoint
    from utils.compress.int8 import int8_format
    from utils.compress.quantization import Quantization
    from utils.cpu import keep_freed_memory

    keep_freed_memory()
    kind = int8_format(config.to)
    load_plugin(config.plugin)
    return 0 if Quantization(config, open_checkpoint(config.weights)).run(kind) else 1


if __name__ == "__main__":
    sys.exit(main())
