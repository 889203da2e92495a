"""torch.hub's entries: models that programs written for YOLOv5 call as they are used to, and our own Detector.

    model = torch.hub.load("path/to/this/folder", "custom", path="best.pt", source="local")
    model.conf = 0.4
    results = model(["bus.jpg", "zidane.jpg"], size=640)
    results.print()
    results.pandas().xyxy[0]

    detector = torch.hub.load("path/to/this/folder", "Detector", "best.onnx", source="local")

The caller's own `models` and `utils` packages stay what they are: see `_own_packages`.
"""
from __future__ import annotations

import contextlib
import pathlib
import sys
import threading
import typing
from collections import abc

dependencies = ["torch", "torchvision", "numpy", "cv2", "PIL", "yaml", "tqdm"]

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGES = ("models", "utils")
_laying_aside = threading.RLock()


@contextlib.contextmanager
def _own_packages() -> abc.Iterator[None]:
    """Inside, `import models` and `import utils` mean this project's; outside, whatever they mean to the caller.

    A program in another folder may have packages of these names, imported before or to be imported later. They are laid aside meanwhile. Ours are
    kept afterwards under names that begin with this folder, for the next call; what was made of them works on, as nothing of ours is imported late.
    A program that has imported ours itself keeps them under their plain names. One thread at a time; others must not import theirs meanwhile.
    """
    with _laying_aside:
        yield from _laid_aside()


def _laid_aside() -> abc.Iterator[None]:
    theirs = _loaded()
    if theirs and all(_is_ours(name, module) for name, module in theirs.items()):
        yield
        return
    for name in theirs:
        del sys.modules[name]
    aside = f"{_ROOT}:"
    sys.modules.update(_loaded(aside))
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(_ROOT))
        for name in _loaded():
            sys.modules[aside + name] = sys.modules.pop(name)
        sys.modules.update(theirs)


def _loaded(prefix: str = "") -> dict[str, typing.Any]:
    """What sys.modules holds under our packages' names, each behind `prefix`."""
    modules = {name.removeprefix(prefix): module for name, module in sys.modules.copy().items() if name.startswith(prefix)}
    return {name: module for name, module in modules.items() if name.partition(".")[0] in _PACKAGES}


def _is_ours(name: str, module: typing.Any) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and pathlib.Path(file).resolve().is_relative_to(_ROOT / name.partition(".")[0])


with _own_packages():
    from models import detector, hub_model, spec, weights, yolo
    from models import plugin as plugins
    from utils import device as devices
    from utils import errors


Detector = detector.Detector
Detector.open_weights = staticmethod(weights.open_weights)  # as nothing of ours is imported late


def custom(
    path: str | pathlib.Path, autoshape: bool = True, _verbose: bool = True, device: typing.Any = None, plugin: str = ""
) -> hub_model.HubModel | yolo.DetectionModel:
    """A model of your own weights: a .pt of ours or of YOLOv5, an .onnx file, an *_openvino_model folder.

    Args:
        autoshape: False gives the bare PyTorch network: images (B, 3, H, W) in 0..1 to raw maps.
        _verbose: say what was opened.
        device: "cpu", "cuda:0", 0 …; the first CUDA device, else the CPU, if left out.
        plugin: a Python file of your own blocks.

    Raises:
        UserError: no such file, not a whole one, or not for this device.
    """
    with _own_packages():
        plugins.load_plugin(plugin)
    name = "" if device is None else str(device)
    if not autoshape:
        return yolo.load_model(str(path)).to(devices.select_device(name))
    return _wrapped(weights.open_weights(str(path), name, "fp32", at_once=1), _verbose)


def _named(name: str) -> abc.Callable[..., hub_model.HubModel | yolo.DetectionModel]:
    def entry(
        pretrained: bool = True, channels: int = 3, classes: int = 80, autoshape: bool = True, _verbose: bool = True, device: typing.Any = None
    ) -> hub_model.HubModel | yolo.DetectionModel:
        if channels != 3:
            raise errors.UserError(f"{name}: channels={channels}: images have 3 channels")
        file = pathlib.Path(f"{name}.pt")
        if pretrained and not (file.is_file() and classes == 80):
            raise errors.UserError(
                f"{name}: nothing is fetched from the network, and there is no {file.absolute()} of {classes} classes: load a file of yours with "
                f"torch.hub.load(…, 'custom', path='{file}', source='local'), or give pretrained=False for an untrained network")
        if pretrained:
            return custom(file, autoshape, _verbose, device)
        chosen = devices.select_device("" if device is None else str(device))
        model = yolo.DetectionModel(spec.load_spec(f"{name}.yaml", classes)).to(chosen)
        return _wrapped(weights.ready(model.eval(), name, None, chosen, devices.compute_dtype("fp32", chosen)), _verbose) if autoshape else model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""{name}: {name}.pt of the working folder, or with pretrained=False an untrained network of `classes` classes.

    Args:
        autoshape, _verbose, device: as of `custom`.

    Raises:
        UserError: there is no such file: nothing is fetched from the network.
    """
    return entry


def _wrapped(opened: weights.OpenWeights, verbose: bool) -> hub_model.HubModel:
    if verbose:  # beside what the program itself prints, which others may read
        print(f"{opened.path}: {len(opened.names)} classes, on {opened.description}", file=sys.stderr)
    return hub_model.HubModel(opened)


yolov5n, yolov5s, yolov5m, yolov5l, yolov5x = map(_named, ("yolov5n", "yolov5s", "yolov5m", "yolov5l", "yolov5x"))
yolov5n6, yolov5s6, yolov5m6, yolov5l6, yolov5x6 = map(_named, ("yolov5n6", "yolov5s6", "yolov5m6", "yolov5l6", "yolov5x6"))
