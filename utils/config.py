"""The settings of each script."""
from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from utils.cpu import PrecisionName
from utils.flags import NOT_NEGATIVE, POSITIVE, UNIT, Check, option

PERIOD: Check = (lambda v: v > 0 or v == -1, "must be above 0, or -1 for never")
BATCH: Check = (lambda v: v >= 1 or v == -1, "must be 1 or more, or -1 for the largest that fits in memory")
NAME: Check = (lambda v: Path(v).name not in ("", ".."), "must be a folder's name")
SEED: Check = (lambda v: 0 <= v < 2**32, "must be at least 0 and below 2**32")
INDICES: Check = (lambda v: min(v) >= 0, "must be 0 or more")
SHARE: Check = (lambda v: 0 <= v < 1, "must be at least 0 and below 1")
SEEDS: Check = (lambda v: all(0 <= seed < 2**32 for seed in v), "must be at least 0 and below 2**32")
FEW: Check = (lambda v: v >= 8, "must be 8 or more")
SIZES_OF_BATCH: Check = (lambda v: min(v) >= 1, "must be 1 or more")
SIZE: Check = (lambda v: 32 <= v <= 8192, "must be between 32 and 8192 pixels")
SIZES: Check = (lambda v: len(v) <= 2 and all(32 <= x <= 8192 for x in v), "takes one or two sizes between 32 and 8192 pixels")
WIDTH: Check = (lambda v: 0 <= v <= 1000, "must be between 0 and 1000")
DEFAULT_IMGSZ = 640
_OWN_SIZE = f"the one that the weights were trained at, {DEFAULT_IMGSZ} where they don't say"
PRECISIONS = get_args(PrecisionName)


def _imgsz() -> Any:
    return option(None, f"image size, pixels (default: {_OWN_SIZE})", type=int, check=SIZE, aliases=("--img", "--img-size"))


def _height_and_width() -> Any:
    return option(None, f"image size, pixels: one number, or height and width (default: {_OWN_SIZE})", nargs="+", type=int, check=SIZES,
                  aliases=("--img", "--img-size"))


@dataclass(frozen=True)
class Blocks:
    plugin: str = option("", "a Python file of your own blocks, to be imported and registered", metavar="FILE.py")


@dataclass(frozen=True)
class DataRoot:
    data_root: str = option("", "the folder that holds data sets (also: environment variable YOLO_DATASETS)")


@dataclass(frozen=True)
class Common(Blocks):
    device: str = option("", "cpu, or a CUDA device's number; the first CUDA device, else the CPU, if left out")
    precision: str = option("auto", "auto: bf16 or fp16 where the device has it natively, else fp32", choices=PRECISIONS)


@dataclass(frozen=True)
class NewRun(Common):
    name: str = option("exp", "this run's folder inside --project; a number is added if it exists", check=NAME)
    exist_ok: bool = option(False, "write into an existing run folder")


@dataclass(frozen=True)
class DataOptions(DataRoot):
    data: str = option("shapes.yaml", "data YAML, found as given or in data/")
    download: bool = option(False, "fetch a missing data set from the URLs in its YAML")
    workers: int = option(8, "loader processes, at most one for each core; 0 loads in the main process", check=NOT_NEGATIVE)
    single_cls: bool = option(False, "treat all classes as one")


def quoted(path: str | Path) -> str:
    """As a command line has it."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def for_next(options: TrainConfig | PruneConfig | ExportConfig | QuantizeConfig) -> str:
    """What the command that a script recommends as the next one must say too."""
    flags = [f" --{name.replace('_', '-')} {quoted(value)}" for name in ("plugin", "data_root") if (value := getattr(options, name))]
    return "".join(flags) + (" --single-cls" if getattr(options, "single_cls", False) else "")


@dataclass(frozen=True)
class TrainConfig(DataOptions, NewRun):
    cfg: str = option("", "model YAML, found as given, in models/, models/hub/ or models/timm/")
    weights: str = option("", "start from these weights (.pt of ours or of YOLOv5)")
    teacher: tuple[str, ...] = option((), "learn from these trained networks too (.pt of ours or of YOLOv5, same classes)", nargs="+", type=str)
    distill: float = option(1.0, "with --teacher: gain of what it says of boxes, objects and classes; 1 weighs it like the labels",
                            check=NOT_NEGATIVE)
    distill_features: float = option(0.0, "with --teacher: gain of its feature maps, channel by channel; 0 is off", check=NOT_NEGATIVE)
    teacher_imgsz: int | None = option(None, "with --teacher: its image size, pixels (default: --imgsz)", type=int, check=SIZE)
    hyp: str = option("hyp.scratch.yaml", "hyperparameter YAML, found as given or in data/hyps/ (hyp.qat.yaml with --qat,"
                     " hyp.finetune.yaml for pruned --weights)")
    epochs: int = option(100, "passes over the training images (10 with --qat)", check=POSITIVE)
    batch_size: int = option(16, "images a step, over all processes; -1 fits memory", check=BATCH, aliases=("--batch",))
    imgsz: int = option(DEFAULT_IMGSZ, "image size, pixels; --qat and pruned --weights take their own unless it is given", check=SIZE,
                        aliases=("--img", "--img-size"))
    rect: bool = option(False, "rectangular batches of like aspect ratio, no mosaic")
    resume: str = option("", "go on with an interrupted run: its last.pt, or the newest under --project", nargs="?", const="newest",
                         metavar="last.pt")
    nosave: bool = option(False, "keep last.pt only, no best.pt until the end")
    noval: bool = option(False, "validate after the last epoch only")
    noautoanchor: bool = option(False, "keep the YAML's anchors whatever their recall")
    noplots: bool = option(False, "write no pictures")
    cache: str = option("auto", "keep decoded images: in ram, on disk, auto (as many as fit in half of the free memory) or none",
                        nargs="?", const="ram", choices=("auto", "ram", "disk", "none"))
    image_weights: bool = option(False, "draw images more often where their classes score low")
    multi_scale: bool = option(False, "vary the image size by up to 50 %% from batch to batch")
    optimizer: str = option("SGD", "optimizer", choices=("SGD", "Adam", "AdamW"))
    sync_bn: bool = option(False, "batch norm over all processes (torchrun, CUDA)")
    project: str = option("runs/train", "folder of runs")
    cos_lr: bool = option(False, "cosine instead of linear learning-rate schedule")
    label_smoothing: float = option(0.0, "label smoothing epsilon", check=UNIT)
    patience: int = option(100, "stop after this many epochs without a better fitness; 0 never stops early", check=NOT_NEGATIVE)
    freeze: tuple[int, ...] = option((0,), "rows to freeze: a number N freezes the first N rows, several name the rows",
                                     nargs="+", type=int, check=INDICES)
    save_period: int = option(-1, "also keep weights/epochN.pt every so many epochs", check=PERIOD)
    seed: int = option(0, "seed of everything random", check=SEED)
    slim: float = option(0.0, "network slimming: L1 on batch-norm scales, such as 1e-4, for prune.py --method slimming", check=NOT_NEGATIVE)
    soft_prune: str = option("", "zero the weakest filters after each epoch, for prune.py --method sfp", choices=("sfp", "fpgm"))
    soft_ratio: float = option(0.5, "share of each layer's filters that --soft-prune zeroes", check=SHARE)
    qat: bool = option(False, "fine-tune --weights for int8 (quantization-aware): it computes as quantize.py's file will; see data/hyps/hyp.qat.yaml")
    time_limit: float = option(0.0, "train for so many minutes (and --epochs at most): the learning rate falls with the time; 0 sets no limit",
                               check=NOT_NEGATIVE)


@dataclass(frozen=True)
class InferenceOptions(NewRun):
    weights: str = option("", "checkpoint (.pt of ours or of YOLOv5), .onnx, .torchscript, .tflite, .mnn or .engine file, *_openvino_model, "
                              "*_ncnn_model or *.mlpackage folder", required=True)
    augment: bool = option(False, "test-time augmentation: three scales, one flipped")
    half: bool = option(False, "fp16 (CUDA); the same as --precision fp16")
    save_txt: bool = option(False, "write labels/NAME.txt for each image")
    save_conf: bool = option(False, "with --save-txt: a confidence at the end of each line")

    @property
    def compute_precision(self) -> str:
        return "fp16" if self.half else self.precision


@dataclass(frozen=True)
class ValConfig(DataOptions, InferenceOptions):
    batch_size: int = option(32, "images a batch", check=POSITIVE, aliases=("--batch",))
    imgsz: int | None = _imgsz()
    conf_thres: float = option(0.001, "least confidence", check=UNIT, aliases=("--conf",))
    iou_thres: float = option(0.6, "non-maximum suppression IoU", check=UNIT, aliases=("--iou",))
    max_det: int = option(300, "most boxes an image", check=POSITIVE)
    task: str = option("val", "which split to score; speed times the network on the val split", choices=("train", "val", "test", "speed"))
    verbose: bool = option(False, "a row for each class (up to 20 classes always)")
    save_json: bool = option(False, "write predictions.json in COCO's form")
    noplots: bool = option(False, "write no pictures")
    project: str = option("runs/val", "folder of runs")


@dataclass(frozen=True)
class DetectConfig(InferenceOptions):
    source: str = option("", "image, folder, glob, list file, video, webcam number or stream URL", required=True)
    data: str = option("", "data YAML whose class names an exported file takes that tells none itself")
    imgsz: tuple[int, ...] | None = _height_and_width()
    conf_thres: float = option(0.25, "least confidence", check=UNIT, aliases=("--conf",))
    iou_thres: float = option(0.45, "non-maximum suppression IoU", check=UNIT, aliases=("--iou",))
    max_det: int = option(1000, "most boxes an image", check=POSITIVE)
    classes: tuple[int, ...] | None = option(None, "keep these class numbers only", nargs="+", type=int, check=INDICES)
    agnostic_nms: bool = option(False, "boxes suppress each other across classes")
    save_csv: bool = option(False, "write predictions.csv")
    save_crop: bool = option(False, "write each box's crop to crops/CLASS/")
    nosave: bool = option(False, "write no annotated images or videos")
    view_img: bool = option(False, "show results in a window")
    vid_stride: int = option(1, "take every n-th frame of a video", check=POSITIVE)
    line_thickness: int = option(0, "box line width, pixels; 0 fits it to the image", check=WIDTH)
    hide_labels: bool = option(False, "draw boxes without labels")
    hide_conf: bool = option(False, "draw labels without confidences")
    project: str = option("runs/detect", "folder of runs")


@dataclass(frozen=True)
class ExportConfig(DataRoot, Blocks):
    weights: str = option("", "checkpoint (.pt of ours or of YOLOv5)", required=True)
    include: tuple[str, ...] = option(("onnx",), "formats: onnx openvino ncnn torchscript tflite mnn coreml engine", nargs="+", type=str)
    imgsz: tuple[int, ...] | None = _height_and_width()
    batch_size: int = option(1, "images a batch, where not --dynamic", check=POSITIVE, aliases=("--batch",))
    dynamic: bool = option(False, "a graph for any batch and image size; else for these alone")
    half: bool = option(False, "fp16 weights; images and boxes stay float32")
    opset: int = option(17, "of ONNX", check=POSITIVE)
    nms: bool = option(False, "non-maximum suppression in the graph (onnx, openvino): its output is final boxes")
    conf_thres: float = option(0.25, "with --nms: least confidence", check=UNIT, aliases=("--conf",))
    iou_thres: float = option(0.45, "with --nms: non-maximum suppression IoU", check=UNIT, aliases=("--iou",))
    max_det: int = option(1000, "with --nms: most boxes an image, and the rows of the output",
                         check=(lambda v: 1 <= v <= 8192, "must be between 1 and 8192"))
    simplify: bool = option(False, "fold and merge what an ONNX graph computes needlessly (pip install onnxslim)")
    int8: bool = option(False, "int8 files (onnx, openvino, tflite), calibrated and scored on --data; quantize.py has more to set")
    data: str = option("", "check the files on images of this data YAML's val split, else on generated ones; with --int8 the one it was trained on")
    device: str = option("cpu", "where the checkpoint runs that each file is compared with; files run on the CPU, an engine is built and runs on "
                                "this CUDA device, or the first")


@dataclass(frozen=True)
class QuantizeConfig(DataOptions, Blocks):
    weights: str = option("", "checkpoint (.pt of ours or of YOLOv5)", required=True)
    data: str = option("", "data YAML that it was trained on, found as given or in data/: int8 is calibrated on its train split, scored on val",
                       required=True)
    to: str = option("onnx", "what to write: best_int8.onnx, best_int8_openvino_model/ or best_int8.tflite, beside best.pt",
                     choices=("onnx", "openvino", "tflite"))
    calib: int = option(300, "training images to measure the ranges of activations on", check=FEW)
    max_drop: float = option(1.0, "points of mAP50-95 that int8 may lose: layers stay float until it holds", check=NOT_NEGATIVE)
    sensitivity: bool = option(False, "also write what each layer's rounding costs, as table and picture")
    imgsz: int | None = _imgsz()
    dynamic: bool = option(False, "a graph for any batch and image size; else for one square image")
    batch_size: int = option(32, "images a batch of the validation", check=POSITIVE, aliases=("--batch",))
    seed: int = option(0, "which training images are drawn", check=SEED)


@dataclass(frozen=True)
class CompareConfig(DataOptions, Common):
    cfg: tuple[str, ...] = option((), "model YAMLs, or patterns such as 'models/*.yaml'", nargs="+", type=str)
    weights: tuple[str, ...] = option((), "checkpoints to compare as they are", nargs="+", type=str)
    formats: str = option("", "instead: this checkpoint and the exported files beside it: size, mAP with --data, latency, start-up time",
                          metavar="best.pt")
    data: str = option("", "train and score on this data YAML, found as given or in data/; without it costs are measured only")
    imgsz: int | None = option(None, f"image size, pixels (default: that of --weights, else {DEFAULT_IMGSZ})", type=int, check=SIZE,
                               aliases=("--img", "--img-size"))
    epochs: int = option(100, "passes over the training images, the same for each network", check=POSITIVE)
    budget_minutes: float = option(0.0, "train each network for so many minutes instead", check=NOT_NEGATIVE)
    seeds: tuple[int, ...] = option((0,), "train each network once with each seed", nargs="+", type=int, check=SEEDS)
    batch_size: int = option(16, "images a training step", check=POSITIVE, aliases=("--batch",))
    hyp: str = option("hyp.scratch.yaml", "hyperparameter YAML, found as given or in data/hyps/")
    batches: tuple[int, ...] = option((1, 8), "batch sizes to measure latency at", nargs="+", type=int, check=SIZES_OF_BATCH)
    runtimes: tuple[str, ...] = option((), "measure in these only: pytorchfp32 pytorchbf16 torchscript onnxruntime openvino (default: each"
                                       " that is installed)", nargs="+", type=str)
    layers: bool = option(False, "what each row of each network costs, as table and picture")
    noplots: bool = option(False, "write no pictures")
    name: str = option("exp", "this comparison's folder inside --project; it goes on where it stopped", check=NAME)
    project: str = option("runs/compare", "folder of comparisons")


PRUNING = ("eagleeye", "l1", "fpgm", "slimming", "sfp")


@dataclass(frozen=True)
class PruneConfig(DataOptions, NewRun):
    weights: str = option("", "the trained network (.pt of ours or of YOLOv5)", required=True)
    method: str = option("eagleeye", "eagleeye: the best of many random plans; l1, fpgm, sfp: the same share of each layer; slimming: one threshold "
                         "for all layers", choices=PRUNING)
    target_flops: float = option(0.0, "keep this share of the FLOPs, such as 0.5", check=SHARE)
    target_params: float = option(0.0, "keep this share of the parameters", check=SHARE)
    target_latency: float = option(0.0, "keep this share of the latency measured here", check=SHARE)
    ratio: float = option(0.0, "remove this share of each layer's channels (slimming: of all channels) instead", check=SHARE)
    plan: str = option("", "the numbers of channels of a plan that an earlier search kept", metavar="plans/2.yaml")
    data: str = option("", "data YAML; without it batch norms stay as they are and nothing is scored")
    candidates: int = option(200, "plans that eagleeye tries", check=POSITIVE)
    min_ratio: float = option(0.1, "the least share of channels that a layer keeps", check=SHARE)
    round_to: int = option(8, "numbers of channels are multiples of it", check=POSITIVE)
    calib: int = option(128, "training images that batch norms are re-estimated on", check=FEW)
    held_out: int = option(128, "other training images that candidates are scored on", check=POSITIVE)
    imgsz: int | None = _imgsz()
    seed: int = option(0, "seed of everything random", check=SEED)
    noplots: bool = option(False, "write no pictures")
    project: str = option("runs/prune", "folder of runs")
