"""Make an int8 file of a checkpoint, and say what it costs: mAP, size and latency of float and int8, measured on the same images.

    python quantize.py --weights runs/train/exp/weights/best.pt --data bccd.yaml --to openvino
    python quantize.py --weights runs/train/exp/weights/best.pt --data bccd.yaml --to onnx --max-drop 0.5 --sensitivity

Exit code 1: int8 loses more than --max-drop whatever stays float; the file is kept aside under another name.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from utils.config import DEFAULT_IMGSZ, QuantizeConfig
from utils.errors import script
from utils.flags import parse
from utils.threads import wait_politely


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(QuantizeConfig, argv, "Make an int8 file of a checkpoint.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    import torch

    from models.plugin import load_plugin
    from models.weights import open_checkpoint
    from utils.compress.int8 import int8_format
    from utils.compress.quantization import Quantization
    from utils.cpu import keep_freed_memory
    from utils.data.open import open_splits
    from utils.evaluate.validate import check_classes

    keep_freed_memory()
    kind = int8_format(config.to)
    load_plugin(config.plugin)
    weights, model, trained_at, tuned = open_checkpoint(config.weights)
    config = dataclasses.replace(config, weights=str(weights))
    train, val = open_splits(config, ("train", "val"))
    check_classes(model.names, val.names, config.single_cls, config.weights)
    imgsz = model.whole_strides(config.imgsz or trained_at or DEFAULT_IMGSZ)
    network = model.fused().requires_grad_(False).to(memory_format=torch.channels_last)
    return 0 if Quantization(config, kind, network, train, val, imgsz, tuned).run() else 1


if __name__ == "__main__":
    sys.exit(main())
