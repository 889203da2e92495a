"""Every network YAML: builds, has the known size, and says that size in its header. Built on the meta device: shapes without memory."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.registry import block_names
from models.spec import load_spec
from models.summary import count_gflops
from models.yolo import DetectionModel

FILES = sorted(Path(__file__).resolve().parents[1].glob("models/**/*.yaml"))
HEADER = re.compile(r"^# params ([\d,]+) · GFLOPs ([\d.]+) \(nc 80, 640 px, 2 x MACs\)$", re.MULTILINE)

# Parameters and GFLOPs of the published builds (nc 80), batch norm included.
KNOWN = {
    "yolov5n": (1_872_157, 4.6), "yolov5s": (7_235_389, 16.6), "yolov5m": (21_190_557, 49.2),
    "yolov5l": (46_563_709, 109.6), "yolov5x": (86_749_405, 206.3),
    "yolov5n-ghost": (1_049_217, 2.7), "yolov5s-ghost": (3_897_605, 8.9), "yolov5m-ghost": (8_845_413, 19.5),  # see FOLDED
    "yolov5s-shuffle": (787_085, 3.0), "yolov5s-shuffle-c3": (1_649_853, 4.1),
    "yolov5-p2": (47_493_372, 126.3), "yolov5-bifpn": (46_825_853, 110.4), "yolov5-fpn": (41_117_565, 100.3),
    "yolov5n6": (3_246_940, 4.7), "yolov5s6": (12_626_620, 17.0), "yolov5m6": (35_731_932, 50.3),
    "yolov5l6": (76_770_172, 111.8), "yolov5x6": (140_794_780, 210.5),
    "yolov3": (61_949_149, 156.6), "yolov3-spp": (62_998_749, 157.5), "yolov3-tiny": (8_852_366, 13.3),
}  # fmt: skip
FOLDED = {"yolov5n-ghost": 2.6, "yolov5s-ghost": 8.7, "yolov5m-ghost": 19.2}  # GFLOPs without batch norm
STRIDES = {"yolov5-p2": (4, 8, 16, 32), "yolov5-p34": (8, 16), "yolov3-tiny": (16, 32)}


def build(name: str) -> DetectionModel:
    with torch.device("meta"):
        return DetectionModel(load_spec(name)).eval()


def gigaflops(model: nn.Module, pixels: int = 640, norms: bool = True) -> float:
    """2 x multiply-accumulates in thop's convention: a bias counts one, a norm four for each value, upsampling one; and attention's products."""
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        match module:
            case nn.Conv2d() | nn.ConvTranspose2d():
                taps = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
                macs += output.numel() * (taps + (module.bias is not None))
            case nn.BatchNorm2d() | nn.LayerNorm():
                macs += 4 * output.numel() * norms
            case nn.Upsample():
                macs += output.numel()
            case nn.Linear():
                macs += output.numel() * module.in_features
            case nn.MultiheadAttention():  # four projections
                _, tokens, channels = inputs[0].shape
                macs += 4 * tokens * channels**2

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, pixels, pixels, device="meta"))
    products = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)  # queries x keys, weights x values
    return (2 * macs + products) / 1e9


@pytest.mark.parametrize("name", ["yolov5s", "yolov5n-ghost", "yolov5s-shuffle-c3", "yolov5s-ghostnet", "yolov5s-transformer", "yolov3-tiny"])
def test_thop_counts_the_same(name):
    model = build(f"{name}.yaml")
    assert count_gflops(model) == pytest.approx(gigaflops(model), rel=2e-3)


def test_every_known_network_is_there():
    assert set(KNOWN) <= {path.stem for path in FILES}
    assert len({path.name for path in FILES}) == len(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_size_is_known_and_in_the_header(path):
    model = build(path.name)
    size = sum(p.numel() for p in model.parameters()), float(f"{gigaflops(model):.1f}")
    assert size == KNOWN.get(path.stem, size)
    text = path.read_text(encoding="utf-8")
    assert [(int(params.replace(",", "")), float(gflops)) for params, gflops in HEADER.findall(text)] == [size]
    assert "mAP" in text.split("\nnc:")[0]
    assert model.strides == STRIDES.get(path.stem, (8, 16, 32, 64) if path.stem.endswith("6") else (8, 16, 32))


@pytest.mark.parametrize("name", FOLDED)
def test_ghosts_flops_with_batch_norm_folded(name):
    assert float(f"{gigaflops(build(f'{name}.yaml'), norms=False):.1f}") == FOLDED[name]
    text = next(path for path in FILES if path.stem == name).read_text(encoding="utf-8")
    assert f"folded into the convolutions: {FOLDED[name]}." in text


@pytest.mark.parametrize("name", ["yolov5n-ghost", "yolov5s-ghostnet", "yolov5s-shuffle", "yolov5s-shuffle-c3", "yolov5s-transformer"])
def test_light_networks_train_one_step(name):
    model = DetectionModel(load_spec(f"{name}.yaml", nc=2))
    maps = model(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 3, 64 // s, 64 // s, 7) for s in (8, 16, 32)]
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_row_comments_count_the_rows():
    """A row's trailing `# n` is its number, which 'from' refers to."""
    for path in FILES:
        numbers = [int(n) for n in re.findall(r"^  - \[.*\]  # (\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)]
        assert numbers == list(range(len(load_spec(path.name).layers))), path.name


def test_every_module_named_is_registered():
    assert {layer.module for path in FILES for layer in load_spec(path.name).layers} <= set(block_names())
