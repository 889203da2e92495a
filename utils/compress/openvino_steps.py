"""An int8 OpenVINO model with the steps that its network was trained with (train.py --qat), in place of those that NNCF chose.

NNCF puts the largest weight of a channel on 63.5 steps and moves ranges a little so that 0 is among their values. Each is as good as ours, but a
network that learned to live with one rounding would be given another.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from utils.compress.rounding import INPUT_STEPS, WEIGHT_LEVELS, Range, input_steps
from utils.extras import import_extra

if TYPE_CHECKING:
    import openvino

_TINY = 1e-12


def set_steps(model: openvino.Model, source: openvino.Model, weighted: Mapping[str, str], ranges: Mapping[str, Range]) -> None:
    """Round weights and what layers read as `rounding.py` does, in place. Values that others than weighted layers read too keep NNCF's steps.

    Args:
        source: the float model.
        weighted: layers as the network names them, by operation.
        ranges: by layer.
    """
    operations = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
    for op in source.get_ordered_ops():
        name = op.get_friendly_name()
        if name in weighted and name in operations:
            _set_weight(operations[name], _weight(op))
            if weighted[name] in ranges:
                _set_input(operations[name], ranges[weighted[name]], weighted)


def _set_weight(op: openvino.Node, weight: np.ndarray | None) -> None:
    """The weight is Multiply(Convert(int8 constant), steps), perhaps reshaped; left as it is where it is something else."""
    product = op.input_value(1).get_node()
    while product.get_type_name() in ("Reshape", "Transpose"):
        product = product.input_value(0).get_node()
    if product.get_type_name() != "Multiply" or weight is None:
        return
    convert, steps = (value.get_node() for value in product.input_values())
    shape = tuple(steps.get_output_shape(0))
    if convert.get_type_name() != "Convert" or tuple(convert.get_output_shape(0)) != weight.shape or len(shape) != weight.ndim:
        return
    others = tuple(axis for axis, size in enumerate(shape) if size == 1)
    step = np.maximum(np.abs(weight).max(others, keepdims=True), _TINY) / WEIGHT_LEVELS
    product.input(1).replace_source_output(_constant(step.astype(np.float32)))
    convert.input(0).replace_source_output(_constant(np.rint(weight / step).astype(np.int8)))


def _set_input(op: openvino.Node, seen: Range, weighted: Mapping[str, str]) -> None:
    rounding = op.input_value(0).get_node()
    readers = {target.get_node().get_friendly_name() for target in rounding.output(0).get_target_inputs()}
    if rounding.get_type_name() != "FakeQuantize" or not readers <= weighted.keys():
        return
    step, zero = input_steps(*seen)
    for place, level in ((1, 0), (2, INPUT_STEPS), (3, 0), (4, INPUT_STEPS)):
        rounding.input(place).replace_source_output(_constant(np.float32((level - int(zero)) * float(step))))


def _weight(op: openvino.Node) -> np.ndarray | None:
    """A float layer's weight as it lies in the file."""
    node = op.input_value(1).get_node()
    while node.get_type_name() in ("Reshape", "Transpose", "Convert"):
        node = node.input_value(0).get_node()
    return np.array(node.get_data(), np.float32) if node.get_type_name() == "Constant" else None


def _constant(value: np.ndarray | np.float32) -> openvino.Output:
    return import_extra("openvino.opset13").constant(value).output(0)
