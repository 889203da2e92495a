"""Score a checkpoint, or a file exported from one, on a data set: precision, recall, F1 and COCO's mAP, with curves and pictures.

    python val.py --weights runs/train/exp/weights/best.pt --data bccd.yaml
    python val.py --weights runs/train/exp/weights/best.onnx --data bccd.yaml
    python val.py --weights yolov5n.pt --data coco128.yaml --task train --save-json
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from utils.config import ValConfig
from utils.errors import script
from utils.flags import parse
from utils.threads import wait_politely


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(ValConfig, argv, "Score a checkpoint on a data set.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    from models.plugin import load_plugin
    from models.weights import open_weights
    from utils.cpu import keep_freed_memory
    from utils.data.open import open_splits, val_loader
    from utils.evaluate.official import pycocotools_scores
    from utils.evaluate.output import save_json, save_txt
    from utils.evaluate.table import score_table
    from utils.evaluate.validate import check_classes, validate
    from utils.files import new_run_dir
    from utils.log import info, warn
    from utils.nms import NmsOptions
    from utils.plots.run import draw_validation

    keep_freed_memory()
    load_plugin(config.plugin)
    weights = open_weights(config.weights, config.device, config.compute_precision, config.data, config.data_root)
    nms = NmsOptions(config.conf_thres, config.iou_thres, multi_label=True, max_det=config.max_det)
    nms = nms.with_one_class() if config.single_cls else nms
    weights.tell_limits(nms)
    imgsz = weights.val_size(config.imgsz)
    (split,) = open_splits(config, ("val" if config.task == "speed" else config.task,))
    check_classes(weights.names, split.names, config.single_cls, config.weights)
    loader = val_loader(split, imgsz, config.batch_size, weights.pad_stride, config.workers, weights.device)
    network = (weights.augmented() if config.augment else weights).network

    result = validate(network, loader, split, weights.device, weights.dtype, nms, single_cls=config.single_cls)
    info(score_table(result, split, per_class=config.verbose or len(split.names) <= 20))
    info(f"speed: {result.speed.load:.1f} ms waiting for images, {result.speed.inference:.1f} ms inference, {result.speed.nms:.1f} ms NMS an image "
         f"at {'x'.join(map(str, imgsz)) if isinstance(imgsz, tuple) else imgsz} px, batch {config.batch_size}, on {weights.description}")
    if config.task == "speed" and (config.save_txt or config.save_json):
        warn("--task speed writes nothing: --save-txt and --save-json want another --task")
    if config.task != "speed":
        folder = new_run_dir(config.project, config.name, config.exist_ok)
        if config.save_txt:
            save_txt(folder, result, split, config.save_conf)
        if config.save_json:
            save_json(folder / "predictions.json", result, split)
            ap, ap50 = pycocotools_scores(folder / "predictions.json", result, split)
            info(f"pycocotools on predictions.json: mAP50 {ap50:.6f}, mAP50-95 {ap:.6f} (here: {result.scores.ap50:.6f}, {result.scores.ap:.6f})")
        if not config.noplots:
            draw_validation(folder, result, split)
        info(f"results: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
