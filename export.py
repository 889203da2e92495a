"""Export a checkpoint to other runtimes; every file is compared with it on images before it is called done.

    python export.py --weights runs/train/exp/weights/best.pt --include onnx openvino --data bccd.yaml
    python export.py --weights yolov5n.pt --include onnx --imgsz 384 640 --half
    python export.py --weights best.pt --include openvino --dynamic
    python export.py --weights best.pt --include onnx openvino --int8 --data bccd.yaml

Exit code 1: some format failed, which its line names; the others are done.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from utils.config import DEFAULT_IMGSZ, ExportConfig, QuantizeConfig, quoted
from utils.errors import UserError, script
from utils.flags import parse
from utils.threads import wait_politely

if TYPE_CHECKING:
    from utils.export.formats import Format


@script
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(ExportConfig, argv, "Export a checkpoint to other runtimes.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    import copy

    from models.plugin import load_plugin
    from models.weights import open_checkpoint
    from utils.compress.int8 import int8_format
    from utils.compress.quantization import Quantization
    from utils.cpu import keep_freed_memory
    from utils.device import select_device
    from utils.export.check import check_images
    from utils.export.formats import FORMATS, ExportJob, choose_formats
    from utils.export.metadata import ExportMetadata, GraphNms
    from utils.export.produce import produce
    from utils.log import info

    keep_freed_memory()
    formats = choose_formats(config.include)
    _check_idle(config, [kind.name for kind in formats], [kind.name for kind in FORMATS.values() if kind.by_onnx])
    if config.int8:
        settings = _int8_settings(config)
        load_plugin(config.plugin)
        trained = open_checkpoint(config.weights)
        single_cls = len(trained.model.names) == 1  # then the data may have several, as they had in the training
        quantization = Quantization(dataclasses.replace(settings, single_cls=single_cls), trained)
        return _one_by_one(formats, lambda kind: quantization.run(int8_format(kind.name)))
    device = select_device(config.device)
    load_plugin(config.plugin)
    weights, model, trained_at, _ = open_checkpoint(config.weights)
    network = model.fused().requires_grad_(False)
    images = check_images(config.data, config.data_root)
    checked = f"{len(images)} images of {config.data}" if config.data else "generated images and a photograph (--data names your own)"
    sides = config.imgsz or (trained_at or DEFAULT_IMGSZ,)
    imgsz = network.whole_strides(sides[0]), network.whole_strides(sides[-1])
    nms = GraphNms(config.conf_thres, config.iou_thres, config.max_det) if config.nms else None
    metadata = ExportMetadata.of(network, imgsz, dynamic=config.dynamic, precision="fp16" if config.half else "fp32", source=weights.name, nms=nms)
    job = ExportJob(network, metadata, config.batch_size, config.opset, config.simplify)
    reference = copy.deepcopy(network).to(device) if device.type == "cuda" else network
    info(f"export: {weights.name} for images of {imgsz[0]}x{imgsz[1]} px{' and any other size' if config.dynamic else ''}, {metadata.precision}; "
         f"checked on {checked}")

    def write(kind: Format) -> bool:
        path = produce(job, kind, weights.with_suffix(""), images, reference, device)
        where = f" --device {device.index}" if kind.needs_gpu and device.index else ""
        info(f"    python detect.py --weights {quoted(path)}{where} --source …")
        return True

    return _one_by_one(formats, write)


def _one_by_one(formats: Iterable[Format], write: Callable[[Format], bool]) -> int:
    """The exit code; where one fails the others are done all the same.

    Args:
        write: makes a file; whether it is good. A UserError of its own is one that failed.
    """
    failed = 0
    for kind in formats:
        try:
            failed += not write(kind)
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    return 1 if failed else 0


def _check_idle(config: ExportConfig, formats: Collection[str], by_onnx: Sequence[str]) -> None:
    """Refuse flags that would change nothing.

    Args:
        formats: that are asked for.
        by_onnx: all that are ONNX files or made of them.

    Raises:
        UserError: naming the first.
    """
    of_nms = [name for name in ("conf_thres", "iou_thres", "max_det") if not config.nms]
    of_onnx = [name for name in ("simplify", "opset") if not set(by_onnx).intersection(formats)]
    for names, of in ((of_nms, "--nms, which puts suppression into the graph"), (of_onnx, f"--include {', '.join(by_onnx[:-1])} and {by_onnx[-1]}")):
        for name in names:
            if getattr(config, name) != getattr(ExportConfig, name):
                raise UserError(f"--{name.replace('_', '-')}: is of {of}: leave it out")


def _int8_settings(config: ExportConfig) -> QuantizeConfig:
    """As quantize.py has them.

    Raises:
        UserError: what int8 needs is missing, or it goes with none of what was asked for too.
    """
    if not config.data:
        raise UserError("--int8: is calibrated on the train split of a data set and scored on its val split: name the one that the network was "
                        "trained on, --data my_set.yaml")
    others = [name for name in ("half", "nms", "simplify", "opset", "batch_size", "device") if getattr(config, name) != getattr(ExportConfig, name)]
    if others:
        raise UserError(f"--int8: goes without {' and '.join('--' + name.replace('_', '-') for name in others)}: leave one or the other out")
    if len({*(config.imgsz or ())}) > 1:
        raise UserError(f"--int8: is scored on square images: --imgsz {max(config.imgsz)}, a single number")
    return QuantizeConfig(weights=config.weights, data=config.data, data_root=config.data_root, plugin=config.plugin, dynamic=config.dynamic,
                          imgsz=config.imgsz[0] if config.imgsz else None)


if __name__ == "__main__":
    sys.exit(main())
