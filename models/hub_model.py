"""A model as programs written for YOLOv5's torch.hub entry use it: settings are attributes, images are RGB, one results object for all."""
from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from models.detector import Detector, check_options, class_numbers
from models.weights import OpenWeights
from utils.deploy.hub_results import HubResults
from utils.deploy.inputs import open_pictures
from utils.errors import UserError
from utils.nms import NmsOptions


class HubModel:
    """`model(images, size=640)` finds objects; set its attributes between calls.

    Unlike our own `Detector`, arrays are RGB here, as YOLOv5's hub models take them: `cv2.imread(file)[..., ::-1]`.

    Attributes:
        conf, iou, max_det: least confidence; IoU of suppression; most boxes of an image.
        agnostic: boxes suppress each other across classes.
        multi_label: a box counts once for each class above `conf`.
        classes: keep these class numbers only; None: all.
        amp: mixed precision where the device has it natively; else fp32. An exported file computes as it was opened.
        names: {number: name}; another name for a number shows in the next results.
        stride: image sides are multiples of it.
    """

    Error = UserError  # of the package as torch.hub loaded it, which a program can't import

    def __init__(self, weights: OpenWeights) -> None:
        self._weights = weights
        self.conf = 0.25
        self.iou = 0.45
        self.max_det = 1000
        self.agnostic = False
        self.multi_label = False
        self.classes: int | Sequence[int] | None = None
        self.amp = False
        self.names = dict(enumerate(weights.names))

    @property
    def stride(self) -> int:
        return self._weights.max_stride

    @property
    def device(self) -> torch.device:
        return self._weights.device

    def __call__(self, ims: Any, size: int | Sequence[int] | None = None, augment: bool = False, profile: bool = False) -> HubResults:
        """Objects in one image, or in each of a list.

        Args:
            ims: paths, Pillow images, arrays (H, W, 3) uint8 RGB, tensors (B, 3, H, W) RGB in 0..1, or a list of these. Nothing is fetched: no URLs.
            size: that images are fitted into, pixels; the one that the weights were trained at, if left out.
            augment: test-time augmentation.
            profile: YOLOv5's, without effect: `t` of the results always tells the times.

        Raises:
            UserError: a setting out of its range, something that is no image, or one that can't be read.
        """
        options = NmsOptions(self.conf, self.iou, self.multi_label, self.agnostic, class_numbers(self.classes), self.max_det)
        weights = self._weights.computing("auto" if self.amp else "fp32")
        weights = dataclasses.replace(weights, names=self._all_names())
        start = time.perf_counter()
        pictures = list(open_pictures(ims, rgb=True))
        read_ms = (time.perf_counter() - start) * 1e3
        return HubResults(Detector(weights, augment=augment).run(pictures, check_options(options), size), weights.names, read_ms)

    def _all_names(self) -> tuple[str, ...]:
        count = len(self._weights.names)
        names = self.names if isinstance(self.names, Mapping) else dict(enumerate(self.names))
        if set(names) != set(range(count)):
            raise UserError(f"names: one is needed for each class number from 0 to {count - 1}, found {', '.join(map(repr, names)) or 'none'}")
        return tuple(str(names[n]) for n in range(count))

    def to(self, device: str | int | torch.device) -> HubModel:
        """Move to another device, in place.

        Raises:
            UserError: there is no such device, or the weights are an exported file, which stays where it is.
        """
        self._weights = self._weights.moved(str(device))
        return self

    def cpu(self) -> HubModel:
        return self.to("cpu")

    def cuda(self, device: int | str = "") -> HubModel:
        return self.to(f"cuda:{device}" if str(device).isdecimal() else str(device) or "cuda")

    def eval(self) -> HubModel:
        """It is always ready for inference."""
        return self

    def __repr__(self) -> str:
        weights = self._weights
        return f"HubModel({weights.path}, {len(weights.names)} classes, {weights.description})"
