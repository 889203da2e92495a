"""The door for Python programs: a trained network as a function from images to results."""
from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from utils.config import DetectConfig
from utils.cpu import PrecisionName
from utils.deploy.inputs import Picture, open_pictures
from utils.deploy.predictor import Predictor
from utils.deploy.results import Result
from utils.errors import UserError
from utils.export.backends import is_exported, needs_torch
from utils.export.weights import OpenNetwork, open_exported
from utils.extras import is_installed
from utils.flags import check_value
from utils.nms import NmsOptions

if TYPE_CHECKING:
    import torch

_LIMITS = {f.name: f for f in dataclasses.fields(DetectConfig)}


class Detector:
    """A checkpoint or an exported file as a function of images; finds what detect.py finds. Exported files need no PyTorch.

        from models.detector import Detector

        detector = Detector("best.pt")                      # or best.onnx, best_openvino_model/
        for result in detector(["bus.jpg", "zidane.jpg"], conf=0.4, classes=[0]):
            print(result.path, len(result), result.xyxy, result.conf, result.labels)
            result.save(Path("found") / Path(result.path).name)

    Nothing changes once it is made: several threads may call it at the same time, each with settings of its own.

    Attributes:
        weights: the network, and what those who feed it need to know.
        names: of its classes.
        open_weights: what opens weights of all kinds; None: models/weights.py's, once it is needed.
    """

    open_weights: ClassVar[Callable[..., OpenNetwork] | None] = None

    def __init__(
        self,
        weights: str | Path | OpenNetwork,
        device: str | int | torch.device = "",
        precision: PrecisionName = "auto",
        data: str = "",
        augment: bool = False,
        callers: int = 1,
    ) -> None:
        """
        Args:
            weights: a .pt of ours or of YOLOv5, an exported file or folder, or one that is open already.
            device, precision: as on the command line.
            data: the data YAML that names the classes of an exported file that tells none.
            augment: test-time augmentation: three scales, one flipped.
            callers: threads that will call it side by side: an exported file's runtime divides its threads among so many images.

        Raises:
            UserError: no such file, not a whole one, or not for this device.
        """
        if not isinstance(callers, numbers.Integral) or callers < 1:
            raise UserError(f"callers {callers!r}: expected a whole number of 1 or more")
        if not isinstance(weights, OpenNetwork):
            opened_by = self.open_weights or _opener(str(weights), augment)
            weights = opened_by(str(weights), str(device), precision, data, at_once=int(callers))
        self.weights = weights.augmented() if augment else weights
        self.names = self.weights.names

    def __call__(
        self,
        images: Any,
        conf: float = 0.25,
        iou: float = 0.45,
        classes: int | Iterable[int] | None = None,
        agnostic: bool = False,
        max_det: int = 1000,
        imgsz: int | Sequence[int] | None = None,
    ) -> list[Result]:
        """A result for each image, in the order given; none for an empty list.

        Args:
            images: one image, or a list of them, sizes and kinds mixed: a path, a Pillow image, a uint8 array in OpenCV's order (H, W, 3) BGR, a
                tensor (3, H, W) or (B, 3, H, W) RGB, uint8 or float in 0..1 (utils/deploy/inputs.py).
            conf: least confidence.
            iou: of two boxes that overlap more, the less confident goes.
            classes: keep these class numbers only.
            agnostic: boxes suppress each other across classes.
            max_det: most boxes of an image.
            imgsz: one number, or height and width, that images are fitted into, pixels; the size that the weights were trained at, if left out.

        Raises:
            UserError: a setting out of its range, something that is no image, or one that can't be read.
        """
        options = check_options(NmsOptions(conf, iou, agnostic=agnostic, classes=class_numbers(classes), max_det=max_det))
        return self.run(open_pictures(images), options, imgsz)

    def run(self, pictures: Iterable[Picture], options: NmsOptions, imgsz: int | Sequence[int] | None = None) -> list[Result]:
        """`__call__` on images that are pixels already, with settings that are checked."""
        weights = self.weights
        weights.tell_limits(options)
        predictor = Predictor(weights.runner, weights.names, weights.pad_stride, weights.image_size(_sides(imgsz)), options)
        weights.tell_waste()
        return [dataclasses.replace(predictor(image), path=path) for path, image in pictures]


def _opener(weights: str, augment: bool) -> Callable[..., OpenNetwork]:
    """What opens these weights. PyTorch takes longer to import than all else together: it comes in only for those who need it."""
    if not is_installed("torch") or (is_exported(weights) and not needs_torch(weights) and not augment):
        return open_exported
    from models.weights import open_weights

    return open_weights


def class_numbers(classes: int | Iterable[int] | None) -> tuple[int, ...] | None:
    """One number, or several of any kind that counts as whole, as a tuple; None: all classes.

    Raises:
        UserError: they are no such numbers, or none.
    """
    if classes is None:
        return None
    try:
        chosen = tuple(operator.index(c) for c in (classes if isinstance(classes, Iterable) else (classes,)))
    except TypeError:
        raise UserError(f"classes {classes!r}: give class numbers, such as [0, 2], or None for all") from None
    if not chosen:
        raise UserError("classes []: give at least one class number, or None for all")
    return chosen


def check_options(options: NmsOptions) -> NmsOptions:
    """The options, if each is in the range that detect.py's flag of that name has.

    Raises:
        UserError: one is not.
    """
    for name, flag in (("conf", "conf_thres"), ("iou", "iou_thres"), ("classes", "classes"), ("max_det", "max_det")):
        value = getattr(options, flag)
        if value is not None or flag != "classes":
            _check(name, flag, value)
        if flag != "classes" and not isinstance(value, numbers.Real):
            raise UserError(f"{name} {value!r}: expected a number")
    if not isinstance(options.max_det, numbers.Integral):
        raise UserError(f"max_det {options.max_det!r}: expected a whole number")
    return options


def _sides(imgsz: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if imgsz is None:
        return None
    try:
        sides = tuple(operator.index(side) for side in (imgsz if isinstance(imgsz, Sequence) else (imgsz,)))
    except TypeError:
        raise UserError(f"imgsz {imgsz!r}: one size, or height and width, in whole pixels") from None
    _check("imgsz", "imgsz", sides)
    return sides


def _check(name: str, flag: str, value: Any) -> None:
    try:
        check_value(_LIMITS[flag], value, name)
    except (TypeError, ValueError):
        raise UserError(f"{name} {value!r}: expected a number") from None
