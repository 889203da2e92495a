"""An OpenVINO model in int8 by NNCF: weights by channel, activations symmetric or not as their function needs it (preset MIXED), biases corrected.

Weights take 7 of their 8 bits (overflow fix): see onnx_int8.py. Ranges are the extremes seen, not each image's own on average.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from utils.compress.calibration import CalibrationImages
from utils.compress.openvino_steps import set_steps
from utils.compress.rounding import WEIGHT_LEVELS, Range
from utils.compress.tail import find_tail
from utils.export.backends import find_exported
from utils.export.metadata import ExportMetadata, stamp_openvino
from utils.extras import import_extra
from utils.log import silent_libraries
from utils.signals import keep_signal_stack

_WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")


class OpenvinoQuantizer:
    """A float OpenVINO model to int8 ones that differ in which layers stay float; attributes as of OnnxQuantizer."""

    weight_levels = WEIGHT_LEVELS

    def __init__(self, source: Path, network: nn.Module, images: CalibrationImages, folder: Path,
                 ranges: Mapping[str, Range] | None = None) -> None:
        """
        Args:
            source: the folder of a model that was exported from `network`.
            ranges: of a network that was trained in int8 (train.py --qat): its file rounds as it did, and its biases stay.
        """
        self._core, self._xml, self._images, self._ranges = import_extra("openvino").Core(), find_exported(source), images, ranges
        operations = self._core.read_model(self._xml).get_ordered_ops()
        sources = {op.get_friendly_name(): [value.get_node().get_friendly_name() for value in op.input_values()] for op in operations}
        weighted = [op.get_friendly_name() for op in operations if op.get_type_name() in _WEIGHTED]
        self._decoding = find_tail(sources, weighted).after
        self._nodes_of: dict[str, list[str]] = {}
        for name in weighted:
            self._nodes_of.setdefault(_layer_name(name), []).append(name)
        self.layers = tuple(self._nodes_of)

    def write(self, folder: Path, metadata: ExportMetadata) -> None:
        """The int8 model into a folder that is there; the layers that `metadata` names stay float in it."""
        stay = sorted(self._decoding.union(*(self._nodes_of[layer] for layer in metadata.float_layers)))
        with silent_libraries(), keep_signal_stack():
            nncf = import_extra("nncf")
            ranges = import_extra("nncf.quantization.range_estimator").RangeEstimatorParametersSet
            model = nncf.quantize(  # which shows progress bars of its own
                self._core.read_model(self._xml), nncf.Dataset(self._images), preset=nncf.QuantizationPreset.MIXED, subset_size=len(self._images),
                fast_bias_correction=True, ignored_scope=nncf.IgnoredScope(names=stay, validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=nncf.OverflowFix.ENABLE, disable_bias_correction=self._ranges is not None,
                    activations_range_estimator_params=ranges.MINMAX),
            )
            if self._ranges is not None:
                set_steps(model, self._core.read_model(self._xml), {op: layer for layer, ops in self._nodes_of.items() for op in ops}, self._ranges)
        stamp_openvino(model, metadata)
        import_extra("openvino").save_model(model, folder / self._xml.name, compress_to_fp16=False)


def _layer_name(friendly: str) -> str:
    """`__module.network.model.9.cv2.conv/aten::_convolution/Convolution` as the network names it: `model.9.cv2.conv`."""
    return friendly.partition("/")[0].removeprefix("__module.").removeprefix("network.")
