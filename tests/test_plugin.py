"""--plugin: the example of docs/plugin.md trains, is scored, detects and resumes; each mistake in a user's file is one line that names the place."""
from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import train_flags
from torch import nn

import detect
import train
import val
from models import registry
from models.plugin import load_plugin
from models.spec import ModelSpec, load_spec
from models.yolo import DetectionModel, load_model
from utils.errors import UserError
from utils.files import ROOT

EXAMPLES = ROOT / "docs" / "examples"
PLUGIN = ["--plugin", str(EXAMPLES / "my_blocks.py")]
CFG = str(EXAMPLES / "my_network.yaml")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test's plugins are gone after it."""
    monkeypatch.setattr(registry, "_BLOCKS", dict(registry._BLOCKS))
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        monkeypatch.delitem(sys.modules, name)


def build(tmp_path: Path, code: str, *rows: list) -> DetectionModel:
    """A network of these rows, whose blocks a plugin of this code registers."""
    path = tmp_path / "my_blocks.py"
    path.write_text("import torch\nfrom torch import nn\nfrom models.registry import Wiring, keep_width, register, to_width\n" + code)
    load_plugin(str(path))
    content = {"nc": 2, "anchors": 3, "backbone": [[-1, 1, "Conv", [16, 3, 2]], *rows], "head": [[[-1], 1, "Detect", ["nc", "anchors"]]]}
    return DetectionModel(ModelSpec.from_dict(content, "my.yaml"))


def test_a_row_for_images_of_one_size_is_refused(tmp_path: Path) -> None:
    code = """
@register("Placed", channels=to_width)
class Placed(nn.Module):
    def __init__(self, c1, c2):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, c2, 8, 8))

    def forward(self, x):
        return x + self.places
"""
    down = [[-1, 1, "Conv", [16, 3, 2]]] * 4
    with pytest.raises(UserError, match=r"row 5 \(backbone 5\) Placed: .*line 12 of the plugin"):
        build(tmp_path, code, *down, [-1, 1, "Placed", [16]])


def test_the_example_is_short_and_says_how_it_is_used():
    code = [line for line in (EXAMPLES / "my_blocks.py").read_text().splitlines() if line.strip()]
    assert len(code) <= 20
    page = (ROOT / "docs" / "plugin.md").read_text()
    named = ("train.py", "val.py", "detect.py", "models.summary", "examples/my_blocks.py", "examples/my_network.yaml")
    assert [name for name in named if name not in page] == []
    rules = {name for name, value in vars(registry).items() if callable(value) and name.endswith(("_width", "_widths"))}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == rules


def test_the_example_is_built():
    load_plugin(PLUGIN[1])
    model = DetectionModel(load_spec(CFG, nc=3)).eval()
    blocks = [module for module in model.modules() if type(module).__name__ == "FasterBlock"]
    assert [block.worked for block in blocks] == [8, 16, 16, 64, 64, 64, 128]  # 32 / 4; 64 / 4 twice; 128 / 2 three times; 256 / 2
    assert all(block.add for block in blocks) and model.strides == (8, 16, 32)
    fused = model.fused()
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model(images)), fused.decode(fused(images)), rtol=1e-4, atol=1e-3)


def test_the_example_trains_is_scored_detects_and_resumes(tmp_path, monkeypatch, capsys):
    flags = train_flags(tmp_path)
    flags[flags.index("--cfg") + 1] = CFG
    assert train.main([*flags, *PLUGIN]) == 0
    weights = tmp_path / "runs" / "exp" / "weights"
    model = load_model(str(weights / "best.pt"))
    assert model.spec.layers[2].module == "FasterBlock" and model.names == ("red", "green")
    data = ["--data", flags[flags.index("--data") + 1], "--imgsz", "64", "--device", "cpu", "--workers", "0", "--noplots",
            "--project", str(tmp_path / "val")]
    scored = ["--weights", str(weights / "best.pt"), *data]
    found = ["--weights", str(weights / "best.pt"), "--source", str(tmp_path / "images" / "val"), "--imgsz", "64", "--device", "cpu",
             "--project", str(tmp_path / "detect")]
    assert val.main([*scored, *PLUGIN]) == 0
    assert detect.main([*found, *PLUGIN]) == 0
    resumed = ["--resume", str(weights / "last.pt"), "--epochs", "3"]
    capsys.readouterr()
    assert train.main(resumed) == 2, "no program runs because a checkpoint names it"
    assert "last.pt: its run used --plugin" in capsys.readouterr().err
    assert train.main([*resumed, *PLUGIN]) == 0

    monkeypatch.delitem(registry._BLOCKS, "FasterBlock")  # as a process that has not seen the plugin
    capsys.readouterr()
    for script, argv in ((val, scored), (detect, found)):
        assert script.main(argv) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "best.pt: row 2" in error and "unknown module FasterBlock" in error and "--plugin" in error


def test_nothing_is_imported_without_the_flag():
    before = set(sys.modules)
    load_plugin("")
    assert set(sys.modules) == before


def test_the_same_plugin_twice_is_no_mistake():
    load_plugin(PLUGIN[1])
    first = registry.find_block("FasterBlock").cls
    load_plugin(PLUGIN[1])
    assert registry.find_block("FasterBlock").cls is not first


@pytest.mark.parametrize(("code", "words"), [
    ("x = 1\n\nraise KeyError('mine')\n", ["my_blocks.py:3", "KeyError", "mine"]),
    ("def f():\n    return 1 / 0\n\nf()\n", ["my_blocks.py:2", "ZeroDivisionError"]),
    ("x = (\n", ["SyntaxError", "line 1"]),
    ("import no_such_package\n", ["my_blocks.py:1", "no_such_package"]),
    ("import sys\nsys.exit(0)\n", ["my_blocks.py:2", "SystemExit"]),
    ("from models.registry import register, to_width\n\n@register('Conv', channels=to_width)\nclass Mine:\n    pass\n",
     ["my_blocks.py:", "Conv is registered already, by models.layers"]),  # Python 3.10 counts no decorators
    ("from models.registry import register\n\n@register('Mine')\nclass Mine:\n    pass\n", ["my_blocks.py:3", "channels"]),
])  # fmt: skip
def test_a_file_that_fails(tmp_path, code, words):
    path = tmp_path / "my_blocks.py"
    path.write_text(code)
    with pytest.raises(UserError) as raised:
        load_plugin(str(path))
    line = str(raised.value)
    assert line.startswith("--plugin ") and [word for word in words if word not in line] == [], line
    assert "plugin_my_blocks" not in sys.modules


@pytest.mark.parametrize(("name", "word"), [("nosuch.py", "no such file"), ("", None), (".", "no such file"),
                                            ("blocks.txt", "must be a Python file")])
def test_a_file_that_is_none(tmp_path, name, word):
    (tmp_path / "blocks.txt").write_text("x = 1\n")
    if word is None:
        load_plugin(name)
        return
    with pytest.raises(UserError, match=word):
        load_plugin(str(tmp_path / name))


MISTAKES = {
    "channels": ("def forward(self, x): return x[:, :4]", ["row 1 (backbone 1) Mine", "(1, 4, 128, 128)", "(batch, 16, height, width)",
                                                              "channel rule"]),
    "two tensors": ("def forward(self, x): return x, x", ["row 1", "makes a tuple"]),
    "no forward": ("pass", ["row 1", "fails on an input of shape (16, 128, 128)", "forward"]),
    "an error": ("def forward(self, x):\n        return {}['mine']", ["row 1", "KeyError: 'mine'", "(line 9 of the plugin)"]),
    "an assertion": ("def forward(self, x): assert False", ["row 1", "AssertionError", "of the plugin"]),
    "a shape": ("def forward(self, x): return x.flatten(1)", ["row 1", "(1, 262144)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_block_that_fails(tmp_path, case):
    body, words = MISTAKES[case]
    with pytest.raises(UserError) as raised:
        build(tmp_path, "@register('Mine', channels=to_width)\nclass Mine(nn.Module):\n    def __init__(self, c1, c2):\n        super().__init__()\n"
              f"    {body}\n", [-1, 1, "Mine", [16]])
    line = str(raised.value)
    assert line.startswith("my.yaml: ") and [word for word in words if word not in line] == [], line


def test_a_constructor_that_fails(tmp_path):
    code = "@register('Mine', channels=to_width)\nclass Mine(nn.Module):\n    def __init__(self, c1, c2, k):\n        raise OSError('mine')\n"
    with pytest.raises(UserError, match=r"my\.yaml: row 1 .* Mine: \[16\] does not fit: missing a .* 'k'; it is built as Mine\(c1, c2, k\)"):
        build(tmp_path, code, [-1, 1, "Mine", [16]])
    with pytest.raises(UserError, match=r"OSError: mine \(line 7 of the plugin\)"):
        build(tmp_path, code, [-1, 1, "Mine", [16, 3]])


def test_a_rule_of_ones_own(tmp_path):
    code = """
def widest(inputs, args, scale):
    if len(inputs) < 2:
        raise ValueError("joins several inputs")
    return Wiring([list(inputs), *args], max(inputs))


@register("Blend", channels=widest)
class Blend(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.to_widest = nn.ModuleList(nn.Conv2d(w, max(widths), 1) for w in widths)

    def forward(self, xs):
        return sum(conv(x) for conv, x in zip(self.to_widest, xs))
"""
    model = build(tmp_path, code, [-1, 1, "Conv", [32]], [[-1, -2], 1, "Blend", []])
    assert model.row_shapes == [(16, 128, 128), (32, 128, 128), (32, 128, 128)]
    with pytest.raises(UserError, match=r"my\.yaml: row 1 \(backbone 1\) Blend: \[\] does not fit: joins several inputs"):
        build(tmp_path, code, [-1, 1, "Blend", []])


def test_repeats_inside(tmp_path):
    code = """
@register("Stack", channels=to_width, repeats="inside")
class Stack(nn.Sequential):
    def __init__(self, c1, c2, n, k=1):
        super().__init__(*(nn.Conv2d(c2 if i else c1, c2, k, padding=k // 2) for i in range(n)))
"""
    model = build(tmp_path, code, [-1, 3, "Stack", [32, 3]])
    assert len(model.model[1]) == 3 and model.model[1][0].kernel_size == (3, 3)
