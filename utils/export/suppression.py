"""Non-maximum suppression inside an exported graph, so that its output is final boxes: one program of ONNX operators for ONNX and OpenVINO."""
from __future__ import annotations

import io
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.export.converters import OUTPUT
from utils.export.metadata import GraphNms
from utils.extras import import_extra

if TYPE_CHECKING:
    import onnx
    import openvino

FINAL_OUTPUT = "detections"
_LEAST_OPSET = 13  # from which on the operators below mean one thing

# As utils/nms.py: a box counts for its best class alone, and boxes of one class suppress each other. The kept boxes' confidences stand in a table of
# all places, zero elsewhere, of which each image's best are taken: so every image has as many rows, those without a box zero.
_PROGRAM = Template("""
<ir_version: 8, opset_import: ["": $opset]>
suppression (float[batch, places, $columns] $input) => (float[batch, $most, 6] $output)
<
    int64[1] nms_zero = {0}, int64[1] nms_one = {1}, int64[1] nms_two = {2}, int64[1] nms_four = {4}, int64[1] nms_five = {5},
    int64[1] nms_end = {$columns}, int64[1] nms_last = {-1}, int64[2] nms_image_and_place = {0, 2}, int64[1,1,$classes] nms_numbers = {$numbers},
    int64[4] nms_more_columns = {0, 0, 0, $most}, int64[6] nms_more_rows = {0, 0, 0, 0, $most, 0}, int64[1] nms_most = {$most},
    float nms_none = {0}, float nms_half = {0.5}, float[1] nms_conf = {$conf}, float[1] nms_iou = {$iou}
>
{
    nms_centre = Slice ($input, nms_zero, nms_two, nms_last)
    nms_size = Slice ($input, nms_two, nms_four, nms_last)
    nms_objectness = Slice ($input, nms_four, nms_five, nms_last)
    nms_classes = Slice ($input, nms_five, nms_end, nms_last)
    nms_radius = Mul (nms_size, nms_half)
    nms_from = Sub (nms_centre, nms_radius)
    nms_to = Add (nms_centre, nms_radius)
    nms_corners = Concat <axis = -1> (nms_from, nms_to)
    nms_scores = Mul (nms_classes, nms_objectness)
    nms_best, nms_class = TopK <axis = -1> (nms_scores, nms_one)
    nms_is_best = Equal (nms_class, nms_numbers)
    nms_alone = Where (nms_is_best, nms_scores, nms_none)
    nms_by_class = Transpose <perm = [0, 2, 1]> (nms_alone)
    nms_chosen = NonMaxSuppression (nms_corners, nms_by_class, nms_most, nms_iou, nms_conf)
    nms_places = Gather <axis = 1> (nms_chosen, nms_image_and_place)
    nms_confidence = Squeeze (nms_best, nms_last)
    nms_kept = GatherND (nms_confidence, nms_places)
    nms_shape = Shape (nms_confidence)
    nms_empty = ConstantOfShape (nms_shape)
    nms_table = ScatterND (nms_empty, nms_places, nms_kept)
    nms_wide_table = Pad (nms_table, nms_more_columns)
    nms_top, nms_order = TopK <axis = 1> (nms_wide_table, nms_most)
    nms_class_float = Cast <to = 1> (nms_class)
    nms_rows = Concat <axis = -1> (nms_corners, nms_best, nms_class_float)
    nms_wide_rows = Pad (nms_rows, nms_more_rows)
    nms_index = Unsqueeze (nms_order, nms_last)
    nms_sorted = GatherND <batch_dims = 1> (nms_wide_rows, nms_index)
    nms_is_box = Greater (nms_top, nms_none)
    nms_is_box_float = Cast <to = 1> (nms_is_box)
    nms_mask = Unsqueeze (nms_is_box_float, nms_last)
    $output = Mul (nms_sorted, nms_mask)
}
""")


def suppress_in_onnx(path: Path, classes: int, nms: GraphNms) -> None:
    """Let an ONNX file's boxes (B, N, 5 + C) go through suppression: its one output is then `detections` (B, max_det, 6).

    Columns: x1, y1, x2, y2 in pixels, confidence, class. Of each image the best come first; rows without a box are zero.

    Raises:
        UserError: the file's opset is too old for it.
    """
    onnx = import_extra("onnx")
    model = onnx.load(str(path))
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    if opset < _LEAST_OPSET:
        raise UserError(f"--opset {opset}: --nms takes {_LEAST_OPSET} or more")
    program = _program(classes, nms, opset).graph
    program.output[0].type.tensor_type.shape.dim[0].CopyFrom(model.graph.output[0].type.tensor_type.shape.dim[0])
    model.graph.node.extend(program.node)
    model.graph.initializer.extend(program.initializer)
    del model.graph.output[:]
    model.graph.output.extend(program.output)
    onnx.save(model, str(path))


def suppress_in_openvino(model: openvino.Model, classes: int, nms: GraphNms) -> openvino.Model:
    """Likewise of an OpenVINO model, which is taken apart for it."""
    openvino = import_extra("openvino")
    program = openvino.convert_model(io.BytesIO(_program(classes, nms).SerializeToString()))
    program.inputs[0].replace(model.outputs[0].get_node().input_value(0))
    return openvino.Model(program.get_results(), model.get_parameters())


def _program(classes: int, nms: GraphNms, opset: int = _LEAST_OPSET) -> onnx.ModelProto:
    names = {"input": OUTPUT, "output": FINAL_OUTPUT, "columns": 5 + classes, "classes": classes, "numbers": ", ".join(map(str, range(classes)))}
    return import_extra("onnx").parser.parse_model(_PROGRAM.substitute(
        names, opset=opset, most=nms.max_det, conf=repr(float(nms.conf_thres)), iou=repr(float(nms.iou_thres))))
