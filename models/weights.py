"""One door for all weights: a checkpoint or an exported file, as a network ready for inference."""
from __future__ import annotations

import torch

from models.yolo import model_from_checkpoint
from utils.checkpoint import load_checkpoint
from utils.cpu import PrecisionName
from utils.device import PRECISION, compute_dtype, describe, select_device
from utils.export.backends import is_exported
from utils.export.weights import OpenWeights, open_exported
from utils.network import TorchRunner


def open_weights(weights: str, device: str, precision: PrecisionName, data: str = "", data_root: str = "") -> OpenWeights:
    """The network of a checkpoint, or of an exported file in its own runtime.

    Args:
        device, precision: as on the command line.
        data: the data YAML that names the classes of an exported file that tells none.

    Raises:
        UserError: no such file, not a whole one, or not for this device.
    """
    if is_exported(weights):
        return open_exported(weights, device, precision, data, data_root)
    chosen = select_device(device)
    dtype = compute_dtype(precision, chosen)
    checkpoint = load_checkpoint(weights)
    model = model_from_checkpoint(checkpoint, weights)
    network = model.fused().to(chosen, memory_format=torch.channels_last)
    imgsz = (checkpoint.imgsz, checkpoint.imgsz) if checkpoint.imgsz else None
    return OpenWeights(weights, TorchRunner(network, chosen, dtype), network, model.names, model.max_stride, model.pad_stride, imgsz, None,
                       str(chosen), PRECISION[dtype], describe(chosen, dtype))
