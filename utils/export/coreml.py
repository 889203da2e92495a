"""Core ML packages: a folder that Apple's tools take as one file; written anywhere, run on a Mac."""
from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError, short_reason
from utils.extras import import_extra
from utils.log import no_output, silent_libraries

MLPACKAGE_SUFFIX = ".mlpackage"
RUNS_HERE = sys.platform == "darwin"
_ELSEWHERE = "Core ML runs on a Mac only: take the checkpoint here, or another format"


class CoremlSession:
    """A Core ML package, one image at a time, on whichever of the Mac's processors Core ML chooses."""

    def __init__(self, path: Path) -> None:
        if not RUNS_HERE:
            raise UserError(f"{path}: {_ELSEWHERE}")
        with silent_libraries(), no_output(2):  # it tells which PyTorch it was tried with
            coremltools = import_extra("coremltools")
            try:
                self._model = coremltools.models.MLModel(str(path))
            except Exception as error:  # of the parser or the compiler: of any kind
                raise UserError(f"{path}: Core ML can't load it, it may be cut off or no Core ML package: {short_reason(error)}") from None
        described = self._model.get_spec().description
        image, boxes = described.input[0], described.output[0]
        size = image.type.imageType
        self._names, self._lock = (image.name, boxes.name), threading.Lock()
        self.inputs = (1, 3, size.height, size.width) if len(described.input) == 1 and size.height else None
        self.outputs = tuple(map(int, boxes.type.multiArrayType.shape)) or None
        self.dtype = np.dtype(np.float32)
        self.props = dict(self._model.user_defined_metadata)
        self.description = f"Core ML, by coremltools {coremltools.__version__}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """It takes pictures, as programs for phones have them: 0..1 goes back to the bytes that it was."""
        pictures = (images.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        with self._lock:
            return np.concatenate([self._model.predict({self._names[0]: Image.fromarray(picture)})[self._names[1]] for picture in pictures])
