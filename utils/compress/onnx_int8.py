"""An ONNX file in int8 by ONNX Runtime's quantizer: QDQ format, uint8 activations, int8 weights by channel, what surrounds them in int8 too.

Weights take 7 of their 8 bits: where a processor has no VNNI, two products of 8 bits are added in 16 and saturate, which takes a ShuffleNet from
0.38 to 0.19 mAP; a file must not depend on where it runs.
"""
from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from utils.compress.calibration import CalibrationImages
from utils.compress.rounding import SILU_FLOOR, WEIGHT_LEVELS, Range, round_weight
from utils.compress.tail import find_tail, silu_inputs, with_activation
from utils.export.converters import INPUT
from utils.export.metadata import ExportMetadata, stamp_onnx
from utils.extras import import_extra
from utils.log import silent_libraries

if TYPE_CHECKING:
    import onnx

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = {"Sigmoid", "Mul", "Relu", "LeakyRelu", "HardSigmoid", "HardSwish", "Clip", "Add", "Div", "Tanh", "Softplus", "Gelu", "Elu"}


class OnnxQuantizer:
    """A float ONNX file, calibrated once, to int8 files that differ in which layers stay float.

    Attributes:
        layers: those that can be int8, by the names that they have in the network, in its order.
        weight_levels: on each side of 0.
    """

    weight_levels = WEIGHT_LEVELS

    def __init__(self, source: Path, network: nn.Module, images: CalibrationImages, folder: Path,
                 ranges: Mapping[str, Range] | None = None) -> None:
        """
        Args:
            source: exported by `to_onnx` from `network`.
            folder: for its own files, which must live as long as it does.
            ranges: of a network that was trained in int8. They, and the steps of weights, are those that are found here anyway; the weights that
                stay float here are rounded as training had them.
        """
        onnx, preparation = import_extra("onnx"), import_extra("onnxruntime.quantization.shape_inference")
        self._images, self._path, self._ranges = images, folder / "prepared.onnx", folder / "ranges.json"
        with silent_libraries():
            preparation.quant_pre_process(str(source), str(self._path), skip_symbolic_shape=True)
        model = onnx.load(str(self._path))
        self._nodes = {node.name: node for node in model.graph.node}
        makers = {output: node.name for node in model.graph.node for output in node.output}
        self._sources = {name: [makers[i] for i in node.input if i in makers] for name, node in self._nodes.items()}
        self._activations = {node.name for node in model.graph.node if node.op_type in _ACTIVATIONS}
        weighted = [node.name for node in model.graph.node if node.op_type in _WEIGHTED]
        tail = find_tail(self._sources, weighted)
        # An int8 convolution rounds what it puts out, and Detect's maps are box sides: its convolutions stay float as their decoding does.
        self._float = tail.after | tail.last
        if ranges is not None:
            _round_weights(model, {self._nodes[name].input[1] for name in tail.last if self._nodes[name].op_type == "Conv"})
            onnx.save(model, str(self._path))
        self._nodes_of: dict[str, list[str]] = {}
        for name in weighted:
            if name not in self._float:
                self._nodes_of.setdefault(_layer_name(self._nodes[name]), []).append(name)
        self.layers = tuple(self._nodes_of)
        kinds = ({name for name, node in self._nodes.items() if node.op_type == kind} for kind in ("Sigmoid", "Mul"))
        read_by_silu = silu_inputs(self._sources, *kinds)
        self._silu = self._silu_ranges({self._nodes[name].output[0] for name in read_by_silu}, folder / "augmented.onnx")

    def _silu_ranges(self, tensors: Collection[str], augmented: Path) -> dict[str, Any]:
        """Of what SiLU reads, without the part that it makes 0 of: overrides as `quantize_static` takes them."""
        if not tensors:
            return {}
        tools = import_extra("onnxruntime.quantization")
        with silent_libraries():
            calibrator = tools.calibrate.create_calibrator(self._path, ["Sigmoid"], str(augmented), tools.CalibrationMethod.MinMax)
            calibrator.collect_data(_reader(tools, self._images))
            seen = {name: calibrator_data.range_value for name, calibrator_data in calibrator.compute_data().items() if name in tensors}
        return {name: [{"rmin": np.float32(SILU_FLOOR), "rmax": np.float32(high)}] for name, (low, high) in seen.items() if low < SILU_FLOOR}

    def write(self, path: Path, metadata: ExportMetadata) -> None:
        """The int8 file, in which the layers that `metadata` names stay float, their activation functions with them."""
        tools = import_extra("onnxruntime.quantization")
        # Measured at the first call; later versions of ONNX Runtime can keep it.
        cache = {"calibration_cache_path": self._ranges} if "calibration_cache_path" in inspect.signature(tools.quantize_static).parameters else {}
        stay = self._float.union(*(with_activation(name, self._sources, self._activations)
                                   for layer in metadata.float_layers for name in self._nodes_of[layer]))
        with silent_libraries():
            tools.quantize_static(
                str(self._path), str(path), _reader(tools, self._images), quant_format=tools.QuantFormat.QDQ, per_channel=True, reduce_range=True,
                activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8, nodes_to_exclude=sorted(stay),
                calibrate_method=tools.CalibrationMethod.MinMax, extra_options={"TensorQuantOverrides": self._silu}, **cache,
            )
        stamp_onnx(path, metadata)


def _round_weights(model: onnx.ModelProto, names: Collection[str]) -> None:
    convert = import_extra("onnx.numpy_helper")
    for tensor in model.graph.initializer:
        if tensor.name in names:
            weight = round_weight(torch.from_numpy(convert.to_array(tensor).copy()))
            tensor.CopyFrom(convert.from_array(weight.numpy(), tensor.name))


def _layer_name(node: onnx.NodeProto) -> str:
    """As the network names it, by its weight where the exporter kept that name."""
    weight = node.input[1].removesuffix(".weight")
    return weight.removeprefix("network.") if weight != node.input[1] else node.name


def _reader(tools: Any, images: CalibrationImages) -> Any:
    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self._rest: Iterator[np.ndarray] = images.shown("calibration")

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._rest, None)
            return None if image is None else {INPUT: image}

    return Reader()
