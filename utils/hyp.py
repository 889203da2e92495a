"""Hyperparameters of training, from a YAML."""
from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from utils.errors import UserError
from utils.files import ROOT, did_you_mean, find_file, read_yaml
from utils.flags import NOT_NEGATIVE, POSITIVE, UNIT, Check, check_value
from utils.log import warn


def _hyper(default: float, text: str, check: Check) -> Any:
    return field(default=default, metadata={"help": text, "check": check})


@dataclass(frozen=True)
class Hyp:
    """Hyperparameters, by the names that YOLOv5's hyp files use."""

    lr0: float = _hyper(0.01, "first learning rate", POSITIVE)
    lrf: float = _hyper(0.01, "last learning rate as a share of lr0", UNIT)
    momentum: float = _hyper(0.937, "SGD momentum, Adam beta1", (lambda v: 0 < v < 1, "must be above 0 and below 1"))
    weight_decay: float = _hyper(0.0005, "on weights only", NOT_NEGATIVE)
    warmup_epochs: float = _hyper(3.0, "epochs of warm-up; at least 100 steps from three epochs on, in proportion below", NOT_NEGATIVE)
    warmup_momentum: float = _hyper(0.8, "momentum at the first step", UNIT)
    warmup_bias_lr: float = _hyper(0.1, "bias learning rate at the first step", NOT_NEGATIVE)
    box: float = _hyper(0.05, "gain of the box loss", NOT_NEGATIVE)
    cls: float = _hyper(0.5, "gain of the class loss", NOT_NEGATIVE)
    cls_pw: float = _hyper(1.0, "positive weight of the class loss", POSITIVE)
    obj: float = _hyper(1.0, "gain of the objectness loss", NOT_NEGATIVE)
    obj_pw: float = _hyper(1.0, "positive weight of the objectness loss", POSITIVE)
    anchor_t: float = _hyper(4.0, "largest ratio of box to anchor side", (lambda v: v > 1, "must be above 1"))
    hsv_h: float = _hyper(0.015, "hue shift, share of the circle", UNIT)
    hsv_s: float = _hyper(0.7, "saturation change, share", UNIT)
    hsv_v: float = _hyper(0.4, "brightness change, share", UNIT)
    degrees: float = _hyper(0.0, "rotation, +/- degrees", (lambda v: 0 <= v <= 180, "must be between 0 and 180"))
    translate: float = _hyper(0.1, "shift, +/- share of the image", UNIT)
    scale: float = _hyper(0.5, "zoom, +/- share", (lambda v: 0 <= v < 1, "must be at least 0 and below 1"))
    shear: float = _hyper(0.0, "shear, +/- degrees", (lambda v: 0 <= v < 90, "must be at least 0 and below 90"))
    perspective: float = _hyper(0.0, "perspective, +/- share", (lambda v: 0 <= v <= 0.001, "must be between 0 and 0.001"))
    flipud: float = _hyper(0.0, "probability of an up-down flip", UNIT)
    fliplr: float = _hyper(0.5, "probability of a left-right flip", UNIT)
    mosaic: float = _hyper(1.0, "probability of a mosaic of four images", UNIT)
    mixup: float = _hyper(0.0, "probability of mixing two mosaics", UNIT)


_IDLE_HYPS = {"iou_t", "copy_paste"}  # of YOLOv5's files: in training nothing reads the one, and the other copies outlines, which are boxes here
_OFF_HYPS = {  # what changes nothing, and what to do with another value
    "fl_gamma": ((0,), "there is no focal loss here: set it to 0"),
    "anchors": ((0, 3), "so many a level are named in the model YAML, as anchors: 4; set it to 0 here"),
}


def load_hyp(name: str) -> Hyp:
    """A hyperparameter YAML; keys left out keep the defaults above.

    Raises:
        UserError: unknown key (nearest names given), not a number or out of range.
    """
    path = find_file(name, (ROOT / "data" / "hyps", ROOT / "data"), "hyperparameter YAML")
    return hyp_from_dict(read_yaml(path), path.name)


def hyp_from_dict(content: dict[str, Any], origin: str) -> Hyp:
    fields = {f.name: f for f in dataclasses.fields(Hyp)}
    values = {}
    for key, value in content.items():
        if key in _IDLE_HYPS or (key in _OFF_HYPS and value in _OFF_HYPS[key][0]):
            if key == "copy_paste" and value != 0:
                warn(f"{origin}: copy_paste: {value} does nothing: outlines are taken as boxes here")
            continue
        if key not in fields:
            raise UserError(f"{origin}: {key}: {_OFF_HYPS[key][1] if key in _OFF_HYPS else 'unknown key' + did_you_mean(key, fields)}")
        if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE][+-]?\d+", value):  # 1e-3, which YAML takes for text
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{origin}: {key}: must be a number, found {value!r}")
        check_value(fields[key], float(value), f"{origin}: {key}")
        values[key] = float(value)
    return Hyp(**values)
