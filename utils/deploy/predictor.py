"""One image in, its boxes out: letterbox, network, suppression, and back to the image's own pixels."""
from __future__ import annotations

import time
from collections.abc import Sequence

import cv2
import numpy as np

from utils.data.augment import letterbox
from utils.deploy.results import Result
from utils.errors import UserError
from utils.evaluate.matching import to_detections
from utils.nms import NmsOptions, non_max_suppression
from utils.runner import Runner


class Predictor:
    """A network as a function of one image; keeps nothing between calls, so that several threads may share one.

    Args:
        names: of its classes.
        stride: images are padded to multiples of it; None: to `imgsz` itself.
        imgsz: (height, width) that an image is fitted into, pixels.
        options: which boxes remain.

    Raises:
        UserError: `options.classes` names a class that the network doesn't know.
    """

    def __init__(self, runner: Runner, names: Sequence[str], stride: int | None, imgsz: tuple[int, int], options: NmsOptions) -> None:
        unknown = [c for c in options.classes or () if not 0 <= c < len(names)]
        if unknown:
            shown = " ".join(map(str, unknown))
            raise UserError(f"--classes {shown}: this network knows classes 0 to {len(names) - 1} ({names[0]} to {names[-1]})")
        self.runner = runner
        self.names = tuple(names)
        self.stride = stride
        self.imgsz = imgsz
        self.options = options

    def __call__(self, image: np.ndarray) -> Result:
        """(H, W, 3) uint8 BGR -> its boxes."""
        start = time.perf_counter()
        padded, geometry = letterbox(image, self.imgsz, self.stride)
        rgb = cv2.cvtColor(padded, cv2.COLOR_BGR2RGB)  # (h, w, 3)
        (boxes,) = self.runner.run(rgb[None], self.options.conf_thres)
        inferred = time.perf_counter()
        found = to_detections(non_max_suppression(boxes, self.options), geometry)
        return Result(image, found, self.names, (inferred - start) * 1e3, (time.perf_counter() - inferred) * 1e3)
