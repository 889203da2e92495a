"""Export a checkpoint to other runtimes; every file is compared with it on images before it is called done.

    python export.py --weights runs/train/exp/weights/best.pt --include onnx openvino --data bccd.yaml
    python export.py --weights yolov5n.pt --include onnx --imgsz 384 640 --half
    python export.py --weights best.pt --include openvino --dynamic

Exit code 1: some format failed, which its line names; the others are done.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from utils.config import DEFAULT_IMGSZ, ExportConfig, for_next, quoted
from utils.errors import UserError, script
from utils.flags import parse
from utils.threads import wait_politely


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(ExportConfig, argv, "Export a checkpoint to other runtimes.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    import copy

    from models.plugin import load_plugin
    from models.weights import open_checkpoint
    from utils.cpu import keep_freed_memory
    from utils.device import select_device
    from utils.export.check import check_images
    from utils.export.formats import ExportJob, choose_formats
    from utils.export.metadata import ExportMetadata, GraphNms
    from utils.export.produce import produce
    from utils.log import info

    keep_freed_memory()
    formats = choose_formats(config.include)
    if config.int8:
        raise UserError(_int8(config, [kind.name for kind in formats]))
    device = select_device(config.device)
    load_plugin(config.plugin)
    weights, model, trained_at, _ = open_checkpoint(config.weights)
    network = model.fused().requires_grad_(False)
    images = check_images(config.data, config.data_root)
    checked = f"{len(images)} images of {config.data}" if config.data else f"{len(images)} generated images (--data names your own)"
    sides = config.imgsz or (trained_at or DEFAULT_IMGSZ,)
    imgsz = network.whole_strides(sides[0]), network.whole_strides(sides[-1])
    nms = GraphNms(config.conf_thres, config.iou_thres, config.max_det) if config.nms else None
    metadata = ExportMetadata.of(network, imgsz, dynamic=config.dynamic, precision="fp16" if config.half else "fp32", source=weights.name, nms=nms)
    job = ExportJob(network, metadata, config.batch_size, config.opset, config.simplify)
    reference = copy.deepcopy(network).to(device) if device.type == "cuda" else network
    info(f"export: {weights.name} for images of {imgsz[0]}x{imgsz[1]} px{' and any other size' if config.dynamic else ''}, {metadata.precision}; "
         f"checked on {checked}")

    failed = 0
    for kind in formats:
        try:
            path = produce(job, kind, weights.with_suffix(""), images, reference, device)
            where = f" --device {device.index}" if kind.needs_gpu and device.index else ""
            info(f"    python detect.py --weights {quoted(path)}{where} --source …")
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    return 1 if failed else 0


def _int8(config: ExportConfig, formats: Sequence[str]) -> str:
    """What to do instead."""
    written = [name for name in formats if name in ("onnx", "openvino")]
    size = f" --imgsz {config.imgsz[0]}" if config.imgsz and len({*config.imgsz}) == 1 else ""
    others = "" if written else f"there are no int8 {' or '.join(formats)} files here, but int8 ONNX and OpenVINO files run on ARM too: "
    return (f"--int8: {others}int8 is calibrated and scored on data: python quantize.py --weights {quoted(config.weights)} --data "
            f"{quoted(config.data or 'my_set.yaml')} --to {written[0] if written else 'onnx'}{size}{' --dynamic' * config.dynamic}{for_next(config)}")


if __name__ == "__main__":
    sys.exit(main())
