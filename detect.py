"""Find objects in images, videos and streams.

    python detect.py --weights runs/train/exp/weights/best.pt --source images/
    python detect.py --weights yolov5n.pt --source street.mp4 --classes 0 --save-txt
    python detect.py --weights best_openvino_model/ --source street.mp4
    python detect.py --weights yolov5n.pt --source rtsp://camera/stream --nosave --save-csv

Exit code 2, as after any mistake, also where an image could not be read or a video broke off, which a line names; the rest is done.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from utils.config import DetectConfig
from utils.errors import USER_ERROR, script
from utils.flags import parse
from utils.threads import wait_politely


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(DetectConfig, argv, "Find objects in images, videos and streams.")
    wait_politely()
    # What takes long to import comes in only now, so that --help answers at once; PyTorch only for those who need it: it takes the longest.
    from utils.cpu import keep_freed_memory
    from utils.data.sources import open_source
    from utils.deploy.pipeline import detect
    from utils.deploy.predictor import Predictor
    from utils.deploy.results import Style
    from utils.deploy.window import check_display
    from utils.deploy.writer import Outputs, ResultWriter
    from utils.export.backends import is_exported, needs_torch
    from utils.files import new_run_dir
    from utils.log import info
    from utils.nms import NmsOptions

    keep_freed_memory()
    if config.view_img:
        check_display()
    source = open_source(config.source, config.vid_stride)
    if is_exported(config.weights) and not needs_torch(config.weights) and not config.augment:
        from utils.export.weights import open_exported as open_weights
    else:
        from models.plugin import load_plugin
        from models.weights import open_weights

        load_plugin(config.plugin)
    weights = open_weights(config.weights, config.device, config.compute_precision, config.data)
    if config.augment:
        weights = weights.augmented()
    options = NmsOptions(config.conf_thres, config.iou_thres, agnostic=config.agnostic_nms, classes=config.classes, max_det=config.max_det)
    weights.tell_limits(options)
    imgsz = weights.image_size(config.imgsz)
    predictor = Predictor(weights.runner, weights.names, weights.pad_stride, imgsz, options)

    style = Style(config.line_thickness or None, not config.hide_labels, not config.hide_conf)
    outputs = Outputs(not config.nosave, config.save_txt, config.save_conf, config.save_csv, config.save_crop, style, config.vid_stride)
    writer = ResultWriter(lambda: new_run_dir(config.project, config.name, config.exist_ok), outputs)
    weights.tell_waste()
    tally = detect(source, predictor, writer, config.view_img)
    info(tally.table())
    load, inference, nms, write = (ms / tally.images for ms in (tally.load_ms, tally.inference_ms, tally.nms_ms, writer.busy_s * 1e3))
    info(f"speed: {load:.1f} ms waiting for images, {inference:.1f} ms inference and {nms:.1f} ms NMS an image, {tally.at_once} at a time, "
         f"{write:.1f} ms drawing and writing beside them; "
         f"{tally.images / tally.seconds:.1f} images/s at {imgsz[0]}x{imgsz[1]} px, on {weights.description}")
    if writer.folder:
        info(f"results: {writer.folder}")
    return USER_ERROR if source.missed else 0


if __name__ == "__main__":
    sys.exit(main())
