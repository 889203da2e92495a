"""Find objects in images, videos and streams.

    python detect.py --weights runs/train/exp/weights/best.pt --source images/
    python detect.py --weights yolov5n.pt --source street.mp4 --classes 0 --save-txt
    python detect.py --weights yolov5n.pt --source rtsp://camera/stream --nosave --save-csv
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from utils.config import DEFAULT_IMGSZ, DetectConfig, parse
from utils.errors import script
from utils.threads import wait_politely


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(DetectConfig, argv, "Find objects in images, videos and streams.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    import torch

    from models.plugin import load_plugin
    from models.yolo import model_from_checkpoint
    from utils.checkpoint import load_checkpoint
    from utils.data.sources import open_source
    from utils.deploy.pipeline import detect
    from utils.deploy.predictor import Predictor
    from utils.deploy.results import Style
    from utils.deploy.window import check_display
    from utils.deploy.writer import Outputs, ResultWriter
    from utils.device import compute_dtype, describe, keep_freed_memory, select_device
    from utils.evaluate.tta import Augmented
    from utils.files import new_run_dir
    from utils.log import info
    from utils.nms import NmsOptions

    keep_freed_memory()
    device = select_device(config.device)
    dtype = compute_dtype(config.compute_precision, device)
    if config.view_img:
        check_display()
    source = open_source(config.source, config.vid_stride)
    load_plugin(config.plugin)
    checkpoint = load_checkpoint(config.weights)
    model = model_from_checkpoint(checkpoint, config.weights)
    sides = config.imgsz or (checkpoint.imgsz or DEFAULT_IMGSZ,)
    imgsz = model.whole_strides(sides[0]), model.whole_strides(sides[-1])
    options = NmsOptions(config.conf_thres, config.iou_thres, agnostic=config.agnostic_nms, classes=config.classes, max_det=config.max_det)
    network = model.fused().to(device, memory_format=torch.channels_last)
    predictor = Predictor(Augmented(network) if config.augment else network, model.names, model.pad_stride, imgsz, options, device, dtype)

    style = Style(config.line_thickness or None, not config.hide_labels, not config.hide_conf)
    outputs = Outputs(not config.nosave, config.save_txt, config.save_conf, config.save_csv, config.save_crop, style, config.vid_stride)
    writer = ResultWriter(lambda: new_run_dir(config.project, config.name, config.exist_ok), outputs)
    tally = detect(source, predictor, writer, config.view_img)
    info(tally.table())
    load, inference, nms, write = (ms / tally.images for ms in (tally.load_ms, tally.inference_ms, tally.nms_ms, writer.busy_s * 1e3))
    info(f"speed: {load:.1f} ms waiting for images, {inference:.1f} ms inference and {nms:.1f} ms NMS an image, {tally.at_once} at a time, "
         f"{write:.1f} ms drawing and writing beside them; "
         f"{tally.images / tally.seconds:.1f} images/s at {imgsz[0]}x{imgsz[1]} px, on {describe(device, dtype)}")
    if writer.folder:
        info(f"results: {writer.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
