"""The parser, YAML rows -> ModelSpec -> modules: what it reads, hand-worked; and that no YAML brings another exception, a hang or code to run."""
from __future__ import annotations

import copy
import random
import re
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.activations import parse_activation
from models.build import build_rows
from models.registry import block_names, find_block, register, to_width
from models.spec import IMAGE, ModelSpec, load_spec
from models.yolo import DetectionModel
from utils.errors import UserError

FILES = sorted(Path(__file__).resolve().parents[1].glob("models/**/*.yaml"))
HEAD = {"nc": 3, "anchors": [[10, 13, 16, 30, 33, 23]]}
DETECT = [[-1], 1, "Detect", ["nc", "anchors"]]


def spec_of(rows: list, detect: list = DETECT, **settings_) -> ModelSpec:
    """A network of these rows and one Detect level."""
    return ModelSpec.from_dict({**HEAD, **settings_, "backbone": rows, "head": [detect]}, "my.yaml")


def text_of(rows: str = "[[-1, 1, Conv, [16, 3, 2]]]", head: str = "[[[-1], 1, Detect, [nc, anchors]]]",
            top: str = "nc: 3\nanchors: [[10,13, 16,30, 33,23]]\n") -> str:
    return f"{top}backbone: {rows}\nhead: {head}\n"


def refusal(tmp_path: Path, text: str | bytes) -> str:
    """The one line with which a YAML is refused."""
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised:
        build_rows(load_spec(path))
    line = str(raised.value)
    assert "my.yaml" in line and len(line) < 2100 and line.isprintable(), line
    return line


# What rows mean


def test_rows_are_read():
    spec = spec_of([[-1, 1, "Conv", [64, 6, 2, 2]], [-1, 9, "C3", [128, False, {"e": 0.25}]], [[-1, 0, -3], 1, "Concat", [1]]],
                   depth_multiple=0.33, width_multiple=0.5)
    first, second, third, last = spec.layers
    assert (first.source, first.repeats, first.module, first.args, first.kwargs) == (IMAGE, 1, "Conv", (64, 6, 2, 2), {})
    assert (second.source, second.repeats, second.args, second.kwargs) == (0, 3, (128, False), {"e": 0.25})  # 9 * 0.33 = 2.97
    assert third.source == (1, 0, IMAGE) and third.sources == (1, 0, IMAGE)
    assert last.args == (3, ((10, 13, 16, 30, 33, 23),)) and last.place == "my.yaml: row 3 (head 0) Detect"


@pytest.mark.parametrize(("number", "depth", "repeats"), [(1, 0.33, 1), (3, 0.33, 1), (6, 0.33, 2), (9, 0.33, 3), (9, 0.67, 6), (3, 1.33, 4),
                                                          (2, 0.1, 1), (1, 3.0, 1), (3, 0.5, 2), (9, 0.5, 4)])  # 1.5 and 4.5 round to even
def test_depth_rule(number, depth, repeats):
    assert spec_of([[-1, number, "C3", [16]]], depth_multiple=depth).layers[0].repeats == repeats


@pytest.mark.parametrize(("width", "multiple", "built"), [(64, 0.5, 32), (64, 0.25, 16), (96, 0.75, 72), (100, 0.5, 56), (8, 0.1, 8),
                                                          (1024, 1.25, 1280), (24, 0.5, 24)])  # 24 = 3 * (nc 3 + 5): an output count stays
def test_width_rule(width, multiple, built):
    rows = build_rows(spec_of([[-1, 1, "Conv", [width, 3, 2]]], width_multiple=multiple))
    assert rows.modules[0].conv.out_channels == built and rows.shapes == [(built, 128, 128)]


def test_repeats_go_inside_or_outside():
    rows = build_rows(spec_of([[-1, 3, "C3", [16]], [-1, 3, "Conv", [16, 3]], [-1, 1, "Conv", [16, 3, 2]]]))
    assert len(rows.modules[0].m) == 3 and len(rows.modules[1]) == 3 and rows.modules[1][0].conv.kernel_size == (3, 3)


def test_nc_is_overridden():
    content = {**HEAD, "nc": 80, "backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [DETECT]}
    spec = ModelSpec.from_dict(content, "my.yaml", nc=2)
    assert spec.nc == 2 and spec.layers[-1].args[0] == 2 and spec.to_dict()["nc"] == 2
    assert build_rows(spec).modules[-1].m[0].out_channels == 3 * 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_round_trip(path):
    spec = load_spec(path.name, nc=7)
    plain = spec.to_dict()
    assert ModelSpec.from_dict(plain, path.name) == spec
    assert ModelSpec.from_dict(yaml.safe_load(yaml.safe_dump(plain)), path.name).layers == spec.layers


def test_found_by_name_in_models_and_hub_or_as_a_path(tmp_path):
    assert load_spec("yolov5s.yaml").origin == "yolov5s.yaml"
    assert load_spec("yolov5-p2.yaml").origin == "yolov5-p2.yaml"
    (tmp_path / "own.yaml").write_text(text_of())
    assert load_spec(str(tmp_path / "own.yaml")).nc == 3
    with pytest.raises(UserError, match=r"yolov5s-gost\.yaml: no such model YAML; looked at .*hub.*did you mean yolov5s-ghost\.yaml"):
        load_spec("yolov5s-gost.yaml")


YOLOV5_STYLE = """
# Parameters
nc: 80  # number of classes
depth_multiple: 0.33
width_multiple: 0.25
anchors: 3
activation: nn.LeakyReLU(0.1)
ch: 3

backbone:
  # [from, number, module, args]
  [[-1, 1, Conv, [64, 6, 2, 2]],  # 0-P1/2
   [-1, 1, Conv, [128, 3, 2]],
   [-1, 3, C3, [128]],
   [-1, 1, nn.MaxPool2d, [2]],
   [-1, 1, Conv, [256, 3, 2]],
   [-1, 1, nn.Upsample, [None, 2, 'nearest']],
   [[-1, 3], 1, Concat, [1]],
  ]
head:
  [[-1, 1, Conv, [256, 3, 1, None, 1, 1, False]],
   [-1, 1, nn.Identity, []],
   [[6, -1], 1, Detect, [nc, anchors]],
  ]
"""


def test_a_users_yolov5_style_yaml(tmp_path):
    path = tmp_path / "user.yaml"
    path.write_text(YOLOV5_STYLE)
    model = DetectionModel(load_spec(path))
    assert model.spec.nc == 80 and model.strides == (8, 8) and model.head.anchors.shape == (2, 3, 2)
    assert model.model[5].scale_factor == 2 and model.model[5].size is None
    assert isinstance(model.model[0].act, torch.nn.LeakyReLU) and model.model[0].act.negative_slope == 0.1
    assert isinstance(model.model[2].m[0].cv1.act, torch.nn.LeakyReLU) and isinstance(model.model[7].act, torch.nn.Identity)
    maps = model(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 3, 8, 8, 85)] * 2


# What is refused, and in which words

WRONG_ROWS = {
    "name": ("[[-1, 1, Cov, [16, 3, 2]]]", "row 0 (backbone 0) Cov", "did you mean Conv"),
    "name of another case": ("[[-1, 1, shuffle_block, [16, 2]]]", "row 0", "did you mean Shuffle_Block"),
    "no width": ("[[-1, 1, Conv, []]]", "row 0 (backbone 0) Conv", "output channels", "Conv(c1, c2, k=1"),
    "too many arguments": ("[[-1, 1, Conv, [16, 3, 2, 1, 1, 1, True, 9, 9]]]", "row 0", "too many positional arguments", "Conv(c1, c2, k=1"),
    "unknown argument": ("[[-1, 1, Conv, [16, {kernel: 3}]]]", "row 0", "'kernel'", "Conv(c1, c2, k=1"),
    "argument twice": ("[[-1, 1, C3, [16, {n: 3}]]]", "row 0", "'n'"),
    "self": ("[[-1, 1, C3, [16, {self: 3}]]]", "row 0", "'self'"),
    "mapping with a number as key": ("[[-1, 1, Conv, [16, {3: 3}]]]", "row 0", "names as keys"),
    "ADD of two widths": ("[[-1,1,Conv,[16]], [-1,1,Conv,[32]], [[-1,-2],1,ADD,[1.0]]]", "row 2 (backbone 2) ADD", "32 and 16 channels", "1x1 Conv"),
    "ADD of one": ("[[-1,1,Conv,[16]], [-1,1,ADD,[1.0]]]", "row 1", "list of rows"),
    "ADD of three": ("[[-1,1,Conv,[16]], [-1,1,Conv,[16]], [[-1,-2,-1],1,ADD,[]]]", "row 2", "adds two inputs"),
    "ADD of two sizes": ("[[-1,1,Conv,[16]], [-1,1,Conv,[16,3,2]], [[-1,-2],1,ADD,[]]]", "row 2", "(16, 128, 128) and (16, 256, 256)"),
    "ADD not a number": ("[[-1,1,Conv,[16]], [-1,1,Conv,[16]], [[-1,-2],1,ADD,[.nan]]]", "row 2", "nan", "finite"),
    "Concat of two sizes": ("[[-1,1,Conv,[16]], [-1,1,Conv,[16,3,2]], [[-1,-2],1,Concat,[1]]]", "row 2", "(16, 128, 128) and (16, 256, 256)"),
    "Concat of one": ("[[-1,1,Conv,[16]], [-1,1,Concat,[1]]]", "row 1", "list of rows, such as [-1, 6]"),
    "Concat along height": ("[[-1,1,Conv,[16]], [-1,1,Conv,[16]], [[-1,-2],1,Concat,[2]]]", "row 2", "(1, 16, 512, 256)", "channel rule"),
    "Conv of a list": ("[[[-1],1,Conv,[16]]]", "row 0", "a list of inputs"),
    "Conv of two": ("[[-1,1,Conv,[16]], [[-1,-2],1,Conv,[16]]]", "row 1", "takes one input"),
    "forward": ("[[-1,1,Conv,[16]], [5,1,Conv,[16]]]", "row 1", "'from' 5", "forward", "rows 0 to 0"),
    "itself": ("[[0,1,Conv,[16]]]", "row 0", "the image, -1"),
    "before the first": ("[[-5,1,Conv,[16]]]", "row 0", "-5", "before the first row"),
    "from a float": ("[[-1.0,1,Conv,[16]]]", "row 0", "-1.0", "row number"),
    "from text": ("[['-1',1,Conv,[16]]]", "row 0", "'-1'"),
    "from true": ("[[true,1,Conv,[16]]]", "row 0", "True"),
    "from nothing": ("[[[],1,Conv,[16]]]", "row 0", "empty list"),
    "from a list in a list": ("[[[[-1]],1,Conv,[16]]]", "row 0", "[-1]"),
    "number 0": ("[[-1,0,Conv,[16]]]", "row 0", "number", "found 0"),
    "number true": ("[[-1,true,Conv,[16]]]", "row 0", "number", "True"),
    "number 1.5": ("[[-1,1.5,Conv,[16]]]", "row 0", "number", "1.5"),
    "number huge": ("[[-1,99999,C3,[16]]]", "row 0 (backbone 0) C3", "blocks", "99999"),
    "width true": ("[[-1,1,Conv,[True]]]", "row 0", "True", "whole number"),
    "width negative": ("[[-1,1,Conv,[-16]]]", "row 0", "-16"),
    "width not a number": ("[[-1,1,Conv,[.nan]]]", "row 0", "nan"),
    "width infinite": ("[[-1,1,Conv,[.inf]]]", "row 0", "inf"),
    "width expression": ("[[-1,1,Conv,[64*2]]]", "row 0", "'64*2'", "not evaluated"),
    "width huge": ("[[-1,1,Conv,[4000000000]]]", "row 0", "beyond every machine"),
    "width of 400 digits": (f"[[-1,1,Conv,[1{'0' * 400}]]]", ":3:", "is no int"),
    "width of 5000 digits": (f"[[-1,1,Conv,[1{'0' * 5000}]]]", ":3:"),
    "width of 5000 hexadecimal digits": (f"[[-1,1,Conv,[0x1{'0' * 5000}]]]", ":3:"),
    "kernel huge": ("[[-1,1,Conv,[16,10000001]]]", "row 0", "beyond every machine"),
    "kernel negative": ("[[-1,1,Conv,[16,-1]]]", "row 0"),
    "kernel text": ("[[-1,1,Conv,[16,x]]]", "row 0"),
    "kernel 2.5": ("[[-1,1,Conv,[16,2.5]]]", "row 0"),
    "kernel even": ("[[-1,1,Conv,[16,4]]]", "Detect", "255 x 255 cells", "whole stride"),
    "stride 0": ("[[-1,1,Conv,[16,3,0]]]", "row 0"),
    "stride 3": ("[[-1,1,Conv,[16,3,3]]]", "Detect", "86 x 86 cells", "whole stride"),
    "stride of one side": ("[[-1,1,Conv,[16,3,[2,1]]]]", "Detect", "128 x 256 cells"),
    "padding huge": ("[[-1,1,Conv,[16,3,1,100000]]]", "row 0", "beyond every machine"),
    "upsampled above the image": ("[[-1,1,nn.Upsample,[None,2,nearest]]]", "Detect", "512 x 512 cells"),
    "upsampled hugely": ("[[-1,1,nn.Upsample,[None,100,nearest]]]", "row 0", "beyond every machine"),
    "upsampled to a huge size": ("[[-1,1,nn.Upsample,[100000]]]", "row 0", "beyond every machine"),
    "transposed hugely": ("[[-1,1,DWConvTranspose2d,[16,4,2000]]]", "row 0", "beyond every machine"),
    "padded hugely": ("[[-1,1,nn.ZeroPad2d,[100000]]]", "row 0", "beyond every machine"),
    "pooled to a huge size": ("[[-1,1,nn.AdaptiveAvgPool2d,[100000]]]", "row 0", "beyond every machine"),
    "pooled slowly": ("[[-1,1,SPP,[64,[100001]]]]", "row 0", "beyond every machine"),
    "pooled slowly over few values": ("[[-1,1,nn.MaxPool2d,[511,1,255]]]", "row 0", "beyond every machine"),
    "upsampled how": ("[[-1,1,nn.Upsample,[None,2,nearst]]]", "row 0", "nearst"),
    "groups": ("[[-1,1,Conv,[16,3,2,None,5]]]", "row 0", "groups"),
    "activation of one layer": ("[[-1,1,Conv,[16,3,2,None,1,1,nn.ReLU]]]", "row 0", "nn.ReLU", "activation:"),
    "heads": ("[[-1,1,C3TR,[16,{heads: 7}]]]", "row 0", "divisible"),
    "heads by place": ("[[-1,1,C3TR,[16,7]]]", "row 0", "{heads: 8}"),
    "Contract by text": ("[[-1,1,Contract,[x]]]", "row 0"),
    "Contract by 0": ("[[-1,1,Contract,[0]]]", "row 0"),
    "Expand by 0": ("[[-1,1,Expand,[0]]]", "row 0"),
    "Expand what does not divide": ("[[-1,1,Expand,[2]]]", "row 0", "3 channels"),
    "no kernels": ("[[-1,1,MixConv2d,[16,[]]]]", "row 0"),
    "ratio 0": ("[[-1,1,GhostConv,[16,3,2,1,True,0]]]", "row 0", "ratio"),
    "ratio huge": ("[[-1,1,GhostConv,[16,3,2,1,True,1000000]]]", "row 0", "beyond every machine"),
    "module a number": ("[[-1,1,7,[16]]]", "row 0", "name", "7"),
    "module a list": ("[[-1,1,[Conv],[16]]]", "row 0", "['Conv']"),
    "module null": ("[[-1,1,null,[16]]]", "row 0", "None"),
    "args a mapping": ("[[-1,1,Conv,{c2: 16}]]", "row 0", "list"),
    "three entries": ("[[-1,1,Conv]]", "row 0 (backbone 0)", "[from, number, module, args]"),
    "a word": ("[Conv]", "row 0 (backbone 0)", "'Conv'"),
    "a mapping": ("[{a: 1}]", "row 0 (backbone 0)"),
    "a date": ("[[-1,1,Conv,[2024-01-01]]]", "row 0", "datetime.date"),
    "bytes": ("[[-1,1,Conv,[!!binary aGVsbG8=]]]", "row 0", "hello"),
    "a set": ("[[-1,1,Conv,[16, !!set {a, b}]]]", "row 0"),
    "many arguments": (f"[[-1,1,MixConv2d,[16,[{'3,' * 200}]]]]", "row 0", "over 100 arguments"),
    "Detect before the end": ("[[-1,1,Conv,[16]], [[-1],1,Detect,[nc,anchors]]]", "row 1", "only the last row may be Detect"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_wrong_rows(tmp_path, case):
    rows, *words = WRONG_ROWS[case]
    line = refusal(tmp_path, text_of(rows))
    assert [word for word in words if word not in line] == [], line


WRONG_HEADS = {
    "no Detect": ("[[-1,1,Conv,[16]]]", "the last row must be Detect"),
    "Detect of a row": ("[[-1,1,Detect,[nc,anchors]]]", "list of rows"),
    "Detect three times": ("[[[-1],3,Detect,[nc,anchors]]]", "once"),
    "Detect without arguments": ("[[[-1],1,Detect,[]]]", "[nc, anchors]"),
    "Detect of other classes": ("[[[-1],1,Detect,[7,anchors]]]", "[nc, anchors]", "found [7"),
    "Detect of other anchors": ("[[[-1],1,Detect,[nc,[[1,2,3,4]]]]]", "[nc, anchors]"),
    "two levels, one row of anchors": ("[[[-1,-1],1,Detect,[nc,anchors]]]", "2 levels but 1 rows of anchors"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_HEADS)
def test_wrong_heads(tmp_path, case):
    head, *words = WRONG_HEADS[case]
    line = refusal(tmp_path, text_of(head=head))
    assert [word for word in words if word not in line] == [], line


WRONG_SETTINGS = {
    "anchors missing": ("nc: 3\n", "'anchors:' is missing", "anchors: 3"),
    "anchors text": ("nc: 3\nanchors: '3'\n", "'3'"),
    "anchors true": ("nc: 3\nanchors: true\n", "True"),
    "anchors 0": ("nc: 3\nanchors: 0\n", "found 0"),
    "anchors huge": ("nc: 3\nanchors: 900000000\n", "900000000"),
    "anchors of three numbers": ("nc: 3\nanchors: [[1,2,3]]\n", "row 0", "pairs"),
    "anchors not a number": ("nc: 3\nanchors: [[1,.nan]]\n", "row 0", "nan"),
    "anchors ragged": ("nc: 3\nanchors: [[1,2],[1,2,3,4]]\n", "row 1"),
    "anchors negative": ("nc: 3\nanchors: [[1,-2]]\n", "-2"),
    "anchors empty": ("nc: 3\nanchors: []\n", "anchors"),
    "nc expression": ("nc: 40*2\nanchors: 3\n", "nc", "'40*2'", "not evaluated"),
    "nc true": ("nc: yes\nanchors: 3\n", "nc", "True"),
    "nc 0": ("nc: 0\nanchors: 3\n", "nc", "found 0"),
    "nc 2.0": ("nc: 2.0\nanchors: 3\n", "nc", "2.0"),
    "nc huge": ("nc: 99999\nanchors: 3\nwidth_multiple: 1000\n", "beyond every machine"),
    "nc null": ("nc: null\nanchors: 3\n", "nc", "None"),
    "width infinite": ("nc: 3\nanchors: 3\nwidth_multiple: .inf\n", "width_multiple", "inf"),
    "width huge": ("nc: 3\nanchors: 3\nwidth_multiple: 99999\n", "row 0", "beyond every machine"),
    "depth negative": ("nc: 3\nanchors: 3\ndepth_multiple: -1\n", "depth_multiple", "-1"),
    "activation a list": ("nc: 3\nanchors: 3\nactivation: [nn.ReLU]\n", "activation"),
    "activation unknown": ("nc: 3\nanchors: 3\nactivation: nn.LeakyRelu(0.1)\n", "did you mean LeakyReLU"),
    "activation's argument": ("nc: 3\nanchors: 3\nactivation: nn.LeakyReLU(slope=1)\n", "slope"),
    "activation's huge argument": ("nc: 3\nanchors: 3\nactivation: nn.PReLU(4000000000)\n", "below 1000"),
    "activation's infinite argument": ("nc: 3\nanchors: 3\nactivation: nn.LeakyReLU(1e999)\n", "below 1000"),
    "activation's text": ("nc: 3\nanchors: 3\nactivation: nn.LeakyReLU('x')\n", "row 0"),
    "activation of a width": ("nc: 3\nanchors: 3\nactivation: nn.PReLU(64)\n", "row 0"),
    "unknown key": ("nc: 3\nankors: 3\nanchors: 3\n", "ankors", "did you mean anchors"),
    "a number as key": ("nc: 3\n1: 3\nanchors: 3\n", "unknown key 1"),
    "a key twice": ("nc: 3\nanchors: 3\nnc: 4\n", ":3:", "'nc' is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings(tmp_path, case):
    top, *words = WRONG_SETTINGS[case]
    line = refusal(tmp_path, text_of(top=top))
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(("text", "word"), [
    (text_of(rows="[]"), "'backbone:'"), (text_of(rows="{a: 1}"), "'backbone:'"), (text_of(head="null"), "'head:'"),
    ("nc: 3\nanchors: 3\nhead: []\n", "'backbone:'"),
])  # fmt: skip
def test_parts_missing(tmp_path, text, word):
    assert word in refusal(tmp_path, text)


# Hostile text


PAYLOAD = "__import__('os').system('touch {path}')"


@pytest.mark.parametrize("text", [
    text_of('[[-1, 1, "PAYLOAD", [16]]]'), text_of('[[-1, 1, Conv, ["PAYLOAD"]]]'), text_of('[[-1, 1, Conv, [16, "PAYLOAD"]]]'),
    text_of('[["PAYLOAD", 1, Conv, [16]]]'), text_of('[[-1, "PAYLOAD", Conv, [16]]]'), text_of('[[-1, 1, Conv, [16, {k: "PAYLOAD"}]]]'),
    text_of('[[-1, 1, Conv, [16, {"PAYLOAD": 1}]]]'), text_of(top='nc: "PAYLOAD"\nanchors: 3\n'), text_of(top='nc: 3\nanchors: "PAYLOAD"\n'),
    text_of(top='nc: 3\nanchors: 3\nactivation: "PAYLOAD"\n'), text_of(top='nc: 3\nanchors: 3\nactivation: "nn.LeakyReLU(PAYLOAD)"\n'),
    text_of(top='nc: 3\nanchors: 3\nwidth_multiple: "PAYLOAD"\n'), text_of(top='nc: 3\nanchors: 3\n"PAYLOAD": 1\n'),
    'nc: !!python/object/apply:os.system ["touch {path}"]\n', 'nc: !!python/object/new:os.system ["touch {path}"]\n',
    "nc: !!python/name:os.system ''\n", "nc: !!python/module:antigravity ''\n", text_of("[[-1, 1, !!python/name:os.system '', [16]]]"),
    "nc: !mine 3\n",
])  # fmt: skip
def test_nothing_is_run(tmp_path, text):
    mark = tmp_path / "run"
    refusal(tmp_path, text.replace("PAYLOAD", PAYLOAD).replace("{path}", str(mark)))
    assert not mark.exists()


LEVELS = "abcdefghi"
BOMB = "".join(f"  {c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in pairwise(LEVELS))


@pytest.mark.parametrize("text", [
    "", "   \n# nothing\n", "- 1\n- 2\n", "hello", "42", "a: 1\n---\nb: 2\n", "a:\n\t- 1\n", "a: [1, 2\n", "a: *b\n", "\x00",
    b"\xff\xfe\x00", b"nc: \xe9\n",
    "nc: 80".encode("utf-16"), "? [a]\n: 1\n", "? {a: 1}\n: 1\n", "nc: !!int abc\n", "nc: !!int ''\n", "nc: !!bool abc\n", "nc: !!float abc\n",
    "nc: !!timestamp abc\n", "nc: 2024-13-45\n", "nc: 12:99:99999999999999999999999999\n", '"\\e[31mred\\nline": 3\n', "nc: " + "[" * 5000,
    "nc: " + "[" * 400 + "]" * 400, "nc: " + "{a: " * 300 + "1" + "}" * 300, f"x:\n  a: &a [x,x,x,x,x,x,x,x,x,x]\n{BOMB}",
    "a: &a {x: 1, y: 2}\n" + "".join(f"{c}: &{c} {{<<: [{','.join(['*' + p] * 10)}]}}\n" for p, c in pairwise(LEVELS)),
    "a: &a [*a]\n", "a: &a {b: *a}\n", text_of("&a [*a]"), text_of("[[-1, 1, Conv, &a [16, *a]]]"), "a: 1\n" * 3,
    text_of(f"[[-1, 1, {'Conv' * 9000}, [16]]]"),
    "x" * 300_000, text_of(top=f"nc: 3\nanchors: 3\nactivation: '{'(' * 3000}'\n"),
    text_of(top=f"nc: 3\nanchors: 3\nactivation: '{'-' * 50_000}1'\n"),
    text_of("[" + "[-1, 1, nn.Identity, []]," * 3000 + "]"),
], ids=range(38))  # fmt: skip
def test_broken_and_hostile_text(tmp_path, text):
    start = time.process_time()
    refusal(tmp_path, text)
    assert time.process_time() - start < 10


def test_an_alias_is_fine(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text_of("[&row [-1, 1, Conv, [16, 3, 2]], *row]"))
    assert build_rows(load_spec(path)).strides == [4]


def test_a_wrong_row_takes_no_memory_and_leaves_the_random_numbers_alone():
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="beyond every machine"):
        build_rows(spec_of([[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [100_000, 1001]]]))
    with pytest.raises(UserError, match="Cov"):
        build_rows(spec_of([[-1, 1, "Cov", [16]]]))
    torch.manual_seed(0)
    first = build_rows(spec_of([[-1, 1, "Conv", [16, 3, 2]]])).modules[0].conv.weight
    torch.manual_seed(0)
    assert torch.equal(first, torch.nn.Conv2d(3, 16, 3, bias=False).weight)  # nothing is drawn but the row's own start values
    torch.set_rng_state(state)


# Random changes of the shipped files: each builds or is refused in one line

VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 7, 64, -7, 99999, 10**9, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "None", "nc",
                     "anchors", "Conv", "C3", "Detect", "Concat", "ADD", "nn.Upsample", "nearest", "nn.ReLU()", "64*2", PAYLOAD, "\x1b[31m", [], {},
                     [1], [-1], [[]], {"k": 3}]),
    st.sampled_from(block_names()), st.integers(-9, 200), st.floats(), st.text(max_size=5),
)  # fmt: skip


def places(node: object, at: tuple = ()) -> list[tuple]:
    items = enumerate(node) if isinstance(node, list) else node.items() if isinstance(node, dict) else ()
    return [place for key, value in items for place in ((*at, key), *places(value, (*at, key)))]


def mutate(content: dict, draw) -> None:
    for _ in range(draw(st.integers(1, 3))):
        found = places(content)
        if not found:
            return
        *path, key = draw(st.sampled_from(found))
        node = content
        for step in path:
            node = node[step]
        change = draw(st.sampled_from(["replace", "replace", "delete", "duplicate", "swap"]))
        if change == "delete":
            del node[key]
        elif change == "replace":
            node[key] = draw(VALUES)
        elif change == "duplicate" and isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        elif isinstance(node, list):
            other = draw(st.integers(0, len(node) - 1))
            node[key], node[other] = node[other], node[key]
        else:
            node[str(key) + "s"] = node[key]


SMALL = ["yolov5n.yaml", "yolov5n-ghost.yaml", "yolov5s-shuffle.yaml", "yolov5s-ghostnet.yaml", "yolov3-tiny.yaml", "yolov5s-transformer.yaml"]


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_changes_build_or_are_refused(data):
    content = load_spec(data.draw(st.sampled_from(SMALL)), nc=2).to_dict()
    content["width_multiple"], content["depth_multiple"] = 0.1, 0.1
    mutate(content, data.draw)
    state = random.getstate()
    try:
        rows = build_rows(ModelSpec.from_dict(content, "my.yaml"))
    except UserError as error:
        assert str(error).startswith("my.yaml: ") and str(error).isprintable() and len(str(error)) < 2100
    else:
        assert all(stride >= 1 for stride in rows.strides)
    assert random.getstate() == state


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SMALL), st.data())
def test_random_changes_of_the_text_build_or_are_refused(tmp_path_factory, name, data):
    text = next(path for path in FILES if path.name == name).read_text(encoding="utf-8").replace("width_multiple: ", "width_multiple: 0.1  # ")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        text = text[:start] + data.draw(st.text("[]{}:,-&*!#'\"\n 01eEx.%@|>?~", max_size=4)) + text[start + data.draw(st.integers(0, 6)) :]
    path = tmp_path_factory.mktemp("text") / "my.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        spec = load_spec(path)
    except UserError as error:
        assert "my.yaml" in str(error) and str(error).isprintable()
    else:
        assert spec.layers[-1].module == "Detect"


# Activations and the registry


@pytest.mark.parametrize(("text", "shown"), [
    ("nn.LeakyReLU(0.1)", "LeakyReLU(negative_slope=0.1, inplace=True)"), ("nn.SiLU()", "SiLU(inplace=True)"), ("ReLU", "ReLU(inplace=True)"),
    ("torch.nn.Hardswish()", "Hardswish()"), (" nn.ReLU6(inplace=False) ", "ReLU6()"), ("nn.GELU('tanh')", "GELU(approximate='tanh')"),
    ("nn.ELU(alpha=-0.5)", "ELU(alpha=-0.5, inplace=True)"),
])  # fmt: skip
def test_activations(text, shown):
    assert str(parse_activation(text, "my.yaml")) == shown


@pytest.mark.parametrize("text", [
    "", "nn", "nn.Linear(3, 3)", "nn.ReLU(", "nn.ReLU();import os", "nn.ReLU() if 1 else 2", "lambda: 0", "nn.LeakyReLU(*[1])",
    "nn.LeakyReLU(**{'a': 1})", "nn.LeakyReLU(open('x'))", "nn.LeakyReLU(9**9**9)", "nn.LeakyReLU(nn)", "getattr(nn, 'ReLU')()", "nn.ReLU()()",
    "nn['ReLU']", "nn.ReLU.__init__", "x\0y", "\ud800", "nn.LeakyReLU(1, 2, 3, 4)", "nn.LeakyReLU(1 + 2j)",
])  # fmt: skip
def test_activations_refused(text):
    with pytest.raises(UserError, match=r"^my\.yaml: "):
        parse_activation(text, "my.yaml")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=r"Conv is registered already, by models\.layers"):
        register("Conv", channels=to_width)(dict)
    block = find_block("Conv")
    assert register("Conv", channels=to_width)(block.cls) is block.cls  # the same class again is no mistake: a plugin imported twice
    with pytest.raises(UserError, match=r"unknown module GohstConv; did you mean GhostConv"):
        find_block("GohstConv")


# widths of a pruned network


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_spec_written_as_yaml_is_read_again(path: Path, tmp_path: Path):
    spec = replace(load_spec(path), widths={"0.conv": (None, 24), "1.shuffle": (2, 0, 1)})
    again = tmp_path / path.name
    again.write_text(spec.to_yaml(), encoding="utf-8")
    assert load_spec(again) == spec
    assert len(spec.to_yaml().splitlines()) < len(spec.layers) + 15  # a row a line


@pytest.mark.parametrize(("widths", "reason"), [
    ("3", "widths must name layers"), ("[1, 2]", "widths must name layers"), ("{0.conv: 3}", "each with a list"), ("{1: [3]}", "must name layers"),
    ("{0.conv: [null, -8]}", "widths of 0.conv: -8 is no whole number from 0"), ("{0.conv: [null, 8.0]}", "8.0 is no whole number"),
    ("{0.conv: [null, true]}", "True is no whole number"), ("{0.conv: [null, '8']}", "'8' is no whole number"),
    ("{0.conv: [null, [8]]}", r"\[8\] is no whole number"), ("{0.conv: [null, .nan]}", "nan is no whole number"),
    ("{0.conv: [null, 100001]}", "100001 is no whole number"), ("{0.conv: [null, 99999]}", "widths of 0.conv: 99999 is not between 1 and its own 16"),
    ("{0.conv: [null, 0]}", "0 is not between 1"), ("{0.conv: [3]}", "takes 2 numbers"), ("{0.conv: []}", "takes 2 numbers"),
    ("{9.conv: [3, 8]}", "the network has no layer 9.conv"), ("{0.act: [8]}", "a SiLU can't be narrowed"),
    ("{0.conv: [null, 8]}", r"row 0 \(backbone 0\) Conv: fails on an input"), ("{0.bn: [8]}", r"row 0 \(backbone 0\) Conv: fails"),
    ("{0.conv: [2, 16]}", r"row 0 \(backbone 0\) Conv: fails"), ("{0.conv: [null, 8], 0.bn: [8]}", r"row 1 \(head 0\) Detect: fails"),
], ids=str)  # fmt: skip
def test_widths_that_can_not_be(tmp_path: Path, widths: str, reason: str):
    assert re.search(reason, refusal(tmp_path, f"{text_of()}widths: {widths}\n"))


def test_endless_widths(tmp_path: Path):
    assert "no settings file" in refusal(tmp_path, f"{text_of()}widths: {{0.conv: [{', '.join(['1'] * 100_000)}]}}\n")
    with pytest.raises(UserError, match=r"my.yaml: widths: over 1,000,000 numbers"):
        ModelSpec.from_dict({**yaml.safe_load(text_of()), "widths": {"0.conv": [1] * 1_000_001}}, "my.yaml")


def test_widths_that_can_be(tmp_path: Path):
    spec = spec_of([[-1, 1, "Conv", [16, 3, 2]]], widths={"0.conv": [None, 8], "0.bn": [8], "1.m.0": [8, None]})
    assert ModelSpec.from_dict(spec.to_dict(), spec.origin) == spec
    other = ModelSpec.from_dict(spec.to_dict(), spec.origin, nc=7)  # the classes may still change
    for each in (spec, other):
        model = DetectionModel(each)
        assert [maps.shape[1:] for maps in model.eval()(torch.zeros(1, 3, 64, 64))] == [(3, 32, 32, 5 + each.nc)]
        assert model.model[0].conv.out_channels == 8 and model.row_shapes[0] == (8, 128, 128)
        bias = model.head.m[0].bias.view(3, -1)
        assert (bias[:, 4] < -4).all()  # it starts as every head does
