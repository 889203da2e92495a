"""A TFLite file in int8 by AI Edge Quantizer: int8 activations and weights, by channel, and what surrounds them; images and boxes stay float32."""
from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from utils.compress.calibration import CalibrationImages
from utils.compress.rounding import SILU_FLOOR, Range, weighted_layers
from utils.compress.tail import find_tail, silu_inputs, with_activation
from utils.cpu import cpu_threads
from utils.export.metadata import ExportMetadata
from utils.export.trailer import append_trailer
from utils.extras import import_extra
from utils.log import no_output, silent_libraries

_WEIGHTED = {"CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED", "BATCH_MATMUL"}
_ACTIVATIONS = {"LOGISTIC", "MUL", "RELU", "HARD_SWISH", "ADD", "DIV", "TANH", "GELU", "MINIMUM", "MAXIMUM"}


class TfliteQuantizer:
    """A float TFLite file, calibrated once, to int8 files that differ in which layers stay float; attributes as of OnnxQuantizer."""

    weight_levels = 127

    def __init__(self, source: Path, network: nn.Module, images: CalibrationImages, folder: Path,
                 ranges: Mapping[str, Range] | None = None) -> None:
        """
        Args:
            source: exported by `to_tflite` from `network`.
            ranges: of a network that was trained in int8; those that are found here are the same, and its weights take all 8 bits, which rounds
                them less than training did.
        """
        self._source, self._images = source, images
        graphs = import_extra("ai_edge_quantizer.utils.tfl_flatbuffer_utils")
        model = graphs.read_model(str(source))
        (graph,) = model.subgraphs
        kinds = [graphs.TFL_OP_CODE_TO_NAME.get(model.operatorCodes[op.opcodeIndex].builtinCode) for op in graph.operators]
        kind_of = dict(enumerate(str(getattr(kind, "value", kind)) for kind in kinds))
        self._scopes = [graphs.get_op_scope(op, graph.tensors) for op in graph.operators]  # an operator's name: its outputs'
        makers = {output: op for op, node in enumerate(graph.operators) for output in node.outputs}
        self._sources = {op: [makers[i] for i in node.inputs if i in makers] for op, node in enumerate(graph.operators)}
        read_by_silu = silu_inputs(self._sources, *({op for op, kind in kind_of.items() if kind == name} for name in ("LOGISTIC", "MUL")))
        self._silu = [graphs.get_tensor_name(graph.tensors[graph.operators[op].outputs[0]]) for op in read_by_silu]
        self._activations = {op for op, kind in kind_of.items() if kind in _ACTIVATIONS}
        weighted = [op for op, kind in kind_of.items() if kind in _WEIGHTED]
        tail = find_tail(self._sources, weighted)
        self._float = tail.after | tail.last  # the reason is onnx_int8.py's
        name_of = {_digest(layer.weight.numpy(force=True)): name for name, layer in weighted_layers(network).items()}
        self._ops_of: dict[str, list[int]] = {}
        for op in weighted:
            if op not in self._float:
                weights = [graphs.get_tensor_data(graph.tensors[i], model.buffers) for i in graph.operators[op].inputs[:2]]
                names = [name_of[digest] for weight in weights if weight is not None and (digest := _digest(weight)) in name_of]
                self._ops_of.setdefault(names[0] if names else self._scopes[op], []).append(op)
        self.layers = tuple(self._ops_of)
        self._extremes: dict[str, Any] | None = None

    def write(self, path: Path, metadata: ExportMetadata) -> None:
        """The int8 file, in which the layers that `metadata` names stay float, their activation functions with them."""
        quantizer, types, recipe = (import_extra(f"ai_edge_quantizer.{name}") for name in ("quantizer", "qtyping", "recipe"))
        stay = self._float.union(*(with_activation(op, self._sources, self._activations)
                                   for layer in metadata.float_layers for op in self._ops_of[layer]))
        with silent_libraries():
            self._extremes = self._extremes or self._calibrate(recipe.static_wi8_ai8())
            int8 = quantizer.Quantizer(str(self._source), recipe.static_wi8_ai8())
            places = [(".*", types.TFLOperationName.INPUT), (".*", types.TFLOperationName.OUTPUT),
                      *((f"^{re.escape(self._scopes[op])}$", types.TFLOperationName.ALL_SUPPORTED) for op in sorted(stay))]
            for scope, operation in places:
                int8.update_quantization_recipe(scope, operation, algorithm_key=recipe.AlgorithmName.NO_QUANTIZE)
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars of a moment
                made = int8.quantize(self._extremes, enable_progress_bar=False, enable_progress_report=False)
            path.write_bytes(made.quantized_model)
        append_trailer(path, metadata)

    def _calibrate(self, whole: Any) -> dict[str, Any]:
        """The extremes of every tensor over the images."""
        calibrator, extremes, recipes = (import_extra(f"ai_edge_quantizer.{name}") for name in ("calibrator", "utils.qsv_utils", "recipe_manager"))
        with no_output(2):  # it tells of its kernels
            calibration = calibrator.Calibrator(str(self._source), num_threads=cpu_threads(), qsv_update_func=extremes.min_max_update)
        recipe = recipes.RecipeManager()
        recipe.load_quantization_recipe(whole)
        ((signature, ends),) = calibration.get_signature_list().items()
        for image in self._images.shown("calibration"):
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each image
                calibration.calibrate({signature: [{ends["inputs"][0]: np.ascontiguousarray(image.transpose(0, 2, 3, 1))}]}, recipe)
        found = calibration.get_model_qsvs()
        for name in self._silu:
            if seen := found.get(name):  # none of what has the values of another
                found[name] = seen | {"min": np.maximum(seen["min"], SILU_FLOOR)}
        return found


def _digest(weight: np.ndarray) -> str:
    """Of its values in whatever order: the file keeps them in another layout, and no names."""
    return hashlib.sha256(np.sort(weight, axis=None).tobytes()).hexdigest()
