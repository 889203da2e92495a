"""Networks built from YAML: decode by hand-worked numbers, strides, image shapes, single == batched, anchors, transfer of weights, the summary."""
from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from models.head import Detect, decode
from models.spec import ModelSpec, load_spec
from models.summary import count_gflops, count_macs, count_parameters, layer_table, main
from models.yolo import DetectionModel, build_for_training, check_network, load_model, model_from_checkpoint, transfer_weights
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.errors import UserError

FILES = sorted(Path(__file__).resolve().parents[1].glob("models/**/*.yaml"))
LIGHT = ["yolov5n.yaml", "yolov5n-ghost.yaml", "yolov5s-shuffle-c3.yaml", "yolov5s-ghostnet.yaml", "yolov3-tiny.yaml", "yolov5s-transformer.yaml",
         "yolov5n6.yaml"]
TINY = {"nc": 2, "anchors": [[10, 20, 30, 40]], "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 4]]],
        "head": [[[-1], 1, "Detect", ["nc", "anchors"]]]}  # fmt: skip


def tiny(**changes) -> DetectionModel:
    return DetectionModel(ModelSpec.from_dict({**TINY, **changes}, "tiny.yaml"))


# Decode


def test_decode_by_hand():
    """One level of 1 x 2 cells, two anchors, two classes, stride 8. sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4."""
    log3 = math.log(3)
    raw = torch.zeros(1, 2, 1, 2, 7)
    raw[0, 0, 0, 1] = torch.tensor([log3, -log3, log3, -log3, log3, -log3, 0.0])
    boxes = decode([raw], torch.tensor([[[2.0, 3.0], [4.0, 5.0]]]), [8])
    assert boxes.shape == (1, 4, 7)
    by_cell = boxes.view(2, 2, 7)  # cells, then anchors
    # xy = (2 s - 1/2 + cell) * 8; wh = (2 s)^2 * anchor * 8
    assert by_cell[0, 0].tolist() == pytest.approx([4, 4, 16, 24, 0.5, 0.5, 0.5])
    assert by_cell[0, 1].tolist() == pytest.approx([4, 4, 32, 40, 0.5, 0.5, 0.5])
    assert by_cell[1, 0].tolist() == pytest.approx([(1.5 - 0.5 + 1) * 8, 0, 2.25 * 16, 0.25 * 24, 0.75, 0.25, 0.5])
    assert by_cell[1, 1].tolist() == pytest.approx([12, 4, 32, 40, 0.5, 0.5, 0.5])


def test_decode_counts_rows_as_y_and_columns_as_x():
    raw = torch.zeros(1, 1, 3, 2, 6)
    centres = decode([raw], torch.ones(1, 1, 2), [4])[0, :, :2]
    assert sorted(map(tuple, centres.tolist())) == sorted((4 * (x + 0.5), 4 * (y + 0.5)) for y in range(3) for x in range(2))


def test_decode_of_levels_is_of_each_level():
    maps = [torch.randn(2, 3, 8, 4, 7), torch.randn(2, 3, 4, 2, 7)]
    anchors = torch.rand(2, 3, 2) + 1
    together = decode(maps, anchors, [8, 16])
    apart = [decode([m], anchors[i : i + 1], [s]) for i, (m, s) in enumerate(zip(maps, (8, 16), strict=True))]
    assert torch.equal(together, torch.cat(apart, 1))
    assert decode([m.bfloat16() for m in maps], anchors, [8, 16]).dtype == torch.float32


def test_head_starts_at_the_expected_rates():
    """RetinaNet's start: objectness log(8 / (640 / stride)^2), classes log(0.6 / (nc - 0.99999)), added to the convolution's own."""
    head = Detect(4, [[10, 20, 30, 40], [50, 60, 70, 80]], (8, 16))
    before = [m.bias.detach().clone().view(2, 9) for m in head.m]
    head.set_strides([8, 16])
    for level, stride, start in zip(head.m, (8, 16), before, strict=True):
        bias = level.bias.detach().view(2, 9) - start
        torch.testing.assert_close(bias[:, :4], torch.zeros(2, 4))
        torch.testing.assert_close(bias[:, 4], torch.full((2,), math.log(8 / (640 / stride) ** 2)))
        torch.testing.assert_close(bias[:, 5:], torch.full((2, 4), math.log(0.6 / (4 - 0.99999))))
    assert head.anchors.tolist() == [[[1.25, 2.5], [3.75, 5.0]], [[3.125, 3.75], [4.375, 5.0]]]


# Whole networks


@pytest.mark.parametrize(("name", "strides"), [("yolov5n.yaml", (8, 16, 32)), ("yolov5n6.yaml", (8, 16, 32, 64)), ("yolov3-tiny.yaml", (16, 32))])
def test_strides(name, strides):  # of every YAML: test_models_yaml.py
    model = DetectionModel(load_spec(name, nc=3))
    assert model.strides == strides and model.max_stride == strides[-1]
    assert [model.whole_strides(n) for n in (1, strides[-1], strides[-1] + 1)] == [strides[-1], strides[-1], 2 * strides[-1]]


def check_shapes(name: str, sizes: list[tuple[int, int]]) -> None:
    model = DetectionModel(load_spec(name, nc=2)).eval()
    per_level = model.head.num_anchors
    with torch.no_grad():
        for height, width in sizes:
            maps = model(torch.rand(1, 3, height, width))
            assert [tuple(m.shape) for m in maps] == [(1, per_level, height // s, width // s, 7) for s in model.strides]
            boxes = model.decode(maps)
            assert boxes.shape == (1, sum(per_level * (height // s) * (width // s) for s in model.strides), 7)
            assert boxes.isfinite().all() and ((boxes[..., 4:] >= 0) & (boxes[..., 4:] <= 1)).all() and (boxes[..., 2:4] >= 0).all()


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5n-ghost.yaml", "yolov5s-shuffle.yaml"])
def test_any_image_shape(name):
    check_shapes(name, [(320, 320), (256, 416), (64, 32)])


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_network_takes_images(path):
    check_shapes(path.name, [(64, 128), (128, 64)])


@pytest.mark.parametrize("name", LIGHT)
def test_single_equals_batched(name):
    torch.manual_seed(0)
    model = DetectionModel(load_spec(name, nc=3)).eval()
    images = torch.rand(3, 3, 64, 128)
    with torch.no_grad():
        together = model.decode(model(images))
        for image, boxes in zip(images, together, strict=True):
            torch.testing.assert_close(model.decode(model(image[None]))[0], boxes, rtol=1e-4, atol=1e-4)


def test_channels_last_gives_the_same():
    model = DetectionModel(load_spec("yolov5n.yaml", nc=2)).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        plain = model.decode(model(images))
        last = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(last.decode(last(images.contiguous(memory_format=torch.channels_last))), plain, rtol=1e-3, atol=1e-4)


def test_batch_norm_is_the_familys():
    norms = [m for m in tiny().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all((m.eps, m.momentum) == (1e-3, 0.03) for m in norms)
    assert all(m.training for m in norms)  # a new network trains; finding its strides left no trace in the statistics
    assert all(m.num_batches_tracked == 0 and m.running_mean.abs().max() == 0 for m in norms)


def test_building_draws_no_more_than_the_weights():
    torch.manual_seed(3)
    first = tiny().state_dict()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    second = tiny().state_dict()
    assert torch.equal(after, torch.get_rng_state()) and all(torch.equal(first[key], second[key]) for key in first)


def test_names():
    spec = ModelSpec.from_dict(TINY, "tiny.yaml")
    assert DetectionModel(spec).names == ("0", "1") and DetectionModel(spec, ["cat", "dog"]).names == ("cat", "dog")
    with pytest.raises(UserError, match=r"tiny\.yaml: 2 classes but 1 names"):
        DetectionModel(spec, ["cat"])


# Anchors


def test_anchors_given_by_their_number():
    model = tiny(anchors=4)
    assert model.head.anchors.shape == (1, 4, 2) and not model.head.anchors_given and tiny().head.anchors_given
    assert model.head.anchors[0, :, 0].tolist() == pytest.approx([1.5, 1.5 * 4 ** (1 / 3), 1.5 * 4 ** (2 / 3), 6])


@pytest.mark.parametrize(("anchors", "levels"), [("fine first", [2, 3]), ("coarse first", [2, 3]), ("fine first", [3, 2]), ("coarse first", [3, 2])])
def test_small_anchors_are_on_the_fine_level(anchors: str, levels: list[int]):
    """Whichever way a file lists anchors or levels; so are fitted ones."""
    rows = [[10, 13, 16, 30], [60, 70, 80, 90]]
    conv = [[-1, 1, "Conv", [8, 3, 2]] for _ in range(4)]
    content = {"nc": 2, "anchors": rows if anchors == "fine first" else rows[::-1], "backbone": conv,
               "head": [[levels, 1, "Detect", ["nc", "anchors"]]]}
    model = DetectionModel(ModelSpec.from_dict(content, "x.yaml"))
    by_stride = dict(zip(model.strides, model.anchors_px.flatten(1).tolist(), strict=True))
    assert by_stride == {8: rows[0], 16: rows[1]}
    again = model_from_checkpoint(Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict())), "x.pt")
    assert torch.equal(again.anchors_px, model.anchors_px) and again.strides == model.strides
    model.set_anchors(torch.tensor([[[5.0, 5], [6, 6]], [[50, 50], [60, 60]]]))
    assert dict(zip(model.strides, model.anchors_px.flatten(1).tolist(), strict=True)) == {8: [5, 5, 6, 6], 16: [50, 50, 60, 60]}


def test_anchors_of_a_checkpoint_stay_as_they_were_trained():
    model = tiny(anchors=[[10, 13, 16, 30], [60, 70, 80, 90]], head=[[[0, 1], 1, "Detect", ["nc", "anchors"]]])
    weights = dict(model.state_dict())
    key = next(name for name in weights if name.endswith(".anchors"))
    weights[key] = weights[key].flip(0)
    assert not torch.equal(weights[key], model.head.anchors)
    assert torch.equal(model_from_checkpoint(Checkpoint(model.spec.to_dict(), model.names, weights), "x.pt").head.anchors, weights[key])


def test_a_head_with_numbers_follows_other_classes_and_anchors():
    content = {"nc": 80, "anchors": [[10, 13, 16, 30]], "backbone": [[-1, 1, "Conv", [8, 3, 2]]],
               "head": [[[0], 1, "Detect", [80, [[10, 13, 16, 30]]]]]}
    model = DetectionModel(ModelSpec.from_dict(content, "x.yaml", nc=3))
    assert model.head.nc == 3
    model.set_anchors(torch.tensor([[[5.0, 5], [6, 6]]]))
    assert DetectionModel(ModelSpec.from_dict(model.spec.to_dict(), "x.pt")).anchors_px.flatten().tolist() == [5, 5, 6, 6]
    content["head"][0][3][0] = 20
    with pytest.raises(UserError, match=r"its arguments must be \[nc, anchors\]"):
        ModelSpec.from_dict(content, "x.yaml")
    with pytest.raises(UserError, match=r"^x\.yaml: ch: 1: images have 3 channels here"):
        ModelSpec.from_dict(content | {"ch": 1}, "x.yaml")


def test_anchors_set_are_in_the_spec_and_come_back():
    model = tiny()
    assert model.anchors_px.tolist() == [[[10, 20], [30, 40]]]
    model.set_anchors(torch.tensor([[[8.0, 16.0], [24.0, 32.0]]]))
    assert model.head.anchors.tolist() == [[[1, 2], [3, 4]]] and model.spec.anchors == ((8, 16, 24, 32),)
    again = DetectionModel(ModelSpec.from_dict(model.spec.to_dict(), "tiny.yaml"))
    assert torch.equal(again.head.anchors, model.head.anchors)


# Weights


def test_weights_are_transferred_where_they_fit():
    source, model = tiny(nc=5), tiny()
    before = model.model[-1].m[0].weight.clone()
    transfer = transfer_weights(model, {**source.state_dict(), "stray": torch.zeros(1)})
    assert (transfer.taken, transfer.total) == (len(model.state_dict()) - 2, len(model.state_dict()))
    assert transfer.left == ("model.2.m.0.weight", "model.2.m.0.bias") and "2.m.0.weight" in str(transfer)
    assert torch.equal(model.model[0].conv.weight, source.model[0].conv.weight) and torch.equal(model.model[-1].m[0].weight, before)


def test_checkpoint_and_back(tmp_path):
    model = tiny().eval()
    path = tmp_path / "best.pt"
    halves = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_checkpoint(path, Checkpoint(model.spec.to_dict(), ("cat", "dog"), halves))
    again = load_model(str(path))
    assert again.names == ("cat", "dog") and not again.training and next(again.parameters()).dtype == torch.float32
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images)[0], model(images)[0], rtol=0.02, atol=0.02)


def test_checkpoint_of_another_network_is_refused():
    model = tiny()
    weights = model.state_dict()
    del weights["model.0.conv.weight"]
    with pytest.raises(UserError, match=r"x\.pt: its tensors are not those of its own network: 14 of 15 .*: model\.0\.conv\.weight"):
        model_from_checkpoint(Checkpoint(model.spec.to_dict(), ("a", "b"), weights), "x.pt")
    hostile = {**model.spec.to_dict(), "backbone": [[-1, 1, "__import__('os').system('ls')", [16]]]}
    with pytest.raises(UserError, match=r"^x\.pt: row 0 .*unknown module"):
        model_from_checkpoint(Checkpoint(hostile, ("a", "b"), weights), "x.pt")


def test_network_to_train(tmp_path):
    with pytest.raises(UserError, match="--cfg"):
        check_network("", "")
    model, transfer = build_for_training("yolov5s-shuffle.yaml", "", ["a", "b"])
    assert transfer is None and model.spec.nc == 2 and model.names == ("a", "b")
    trained = tiny()
    trained.set_anchors(torch.tensor([[[8.0, 16.0], [24.0, 32.0]]]))
    path = tmp_path / "best.pt"
    save_checkpoint(path, Checkpoint(trained.spec.to_dict(), ("a", "b"), trained.state_dict()))
    model, transfer = build_for_training("", str(path), ["x", "y", "z"])  # its own network with other classes keeps its anchors
    assert model.spec.nc == 3 and transfer.taken == transfer.total - 2 and torch.equal(model.head.anchors, trained.head.anchors)
    (tmp_path / "tiny.yaml").write_text(str(TINY).replace("'", '"'))
    model, transfer = build_for_training(str(tmp_path / "tiny.yaml"), str(path), ["a", "b"])  # a YAML brings its own
    assert model.anchors_px.tolist() == [[[10, 20], [30, 40]]] and transfer.left == ("model.2.anchors",)


# Summary


def test_counts_by_hand():
    """Conv 3 -> 16, 3x3, stride 2 and stride 4, then a 1x1 Detect of 2 * (5 + 2) outputs with bias, on 64 x 64 pixels."""
    model = tiny()
    weights = 3 * 16 * 9 + 2 * 16 + 16 * 16 * 9 + 2 * 16 + 16 * 14 + 14
    assert count_parameters(model) == weights
    macs = 32 * 32 * 16 * (27 + 4) + 8 * 8 * 16 * (144 + 4) + 8 * 8 * 14 * (16 + 1)  # a batch norm counts four for each value, a bias one
    assert count_gflops(model, 64) == pytest.approx(2 * macs / 1e9)
    assert not hasattr(model.model[0].conv, "total_ops") and model.training


def test_layer_table():
    lines = layer_table(DetectionModel(load_spec("yolov5n.yaml"))).splitlines()
    assert len(lines) == 26 and lines[3].split() == ["2", "1", "1", "4,800", "C3", "128"]
    assert lines[13].split()[:4] == ["12", "[11,", "6]", "1"] and lines[-1].split()[:4] == ["24", "[17,", "20,", "23]"]


def test_summary_script(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(str(TINY).replace("'", '"'))
    assert main(["--cfg", str(tmp_path / "tiny.yaml"), "--imgsz", "60", "--device", "cpu", "--precision", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "3,038 parameters" in out and "GFLOPs at 64 px" in out and "ms an image" in out and "threads, fp32" in out
    for argv, word in ((["--cfg", "nosuch.yaml"], "nosuch.yaml"), (["--cfg", "yolov5n.yaml", "--imgsz", "-5"], "--imgsz -5"),
    (["--cfg", "yolov5n.yaml", "--imgszs", "9"], "did you mean --imgsz")):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and word in error and len(error.splitlines()) == 1


def test_images_are_whole_for_rows_between_too():
    """Two levels, of 8 and 16, above a trunk that goes down to 32 and comes up again."""
    model = DetectionModel(load_spec("yolov5-p34.yaml", 2))
    assert max(model.strides) == 16 and model.max_stride == model.pad_stride == 32 and model.whole_strides(336) == 352
    with torch.no_grad():
        assert [tuple(x.shape[2:4]) for x in model.eval()(torch.zeros(1, 3, 96, 160))] == [(12, 20), (6, 10)]


def test_maps_live_no_longer_than_they_are_needed():
    model, alive, most = DetectionModel(load_spec("yolov5n.yaml", 2)).eval(), weakref.WeakSet(), []

    def watch(module: nn.Module, inputs: tuple, output: Tensor | list[Tensor]) -> None:
        most.append(len(alive))
        if isinstance(output, Tensor):
            alive.add(output)

    for module in model.model:
        module.register_forward_hook(watch)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert max(most) <= 5 < len(model.model) // 2, "its input, and what concatenations further on wait for"


class Products(nn.Module):
    """One of each that counts, on maps of 4 x 8 x 8, most of them called without a layer and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = nn.functional.conv2d(x, torch.ones(6, 2, 3, 3), padding=1, groups=2)
        q = x.flatten(2)  # (1, 6, 64)
        q = nn.functional.linear(input=q, weight=torch.ones(5, 64), bias=None)
        q = nn.functional.scaled_dot_product_attention(query=q, key=q, value=q)
        return torch.einsum("b i k, b j k -> b i j", q, q), torch.addmm(torch.ones(6, 2), q[0], torch.ones(5, 2)), nn.functional.conv1d(
            q, torch.ones(3, 6, 1), torch.ones(3))


class Derived(nn.ConvTranspose2d):
    """As DWConvTranspose2d is."""


def test_products_count_whoever_asks_for_them():
    model = Products()
    macs = 3 * 16 * 4 * 4 + 4 * 64 + 6 * 64 * 2 * 9 + 6 * 5 * 64 + 2 * 6 * 6 * 5 + 6 * 6 * 5 + 6 * 2 * (5 + 1) + 3 * 5 * (6 + 1)
    assert count_macs(model, torch.zeros(1, 3, 4, 4)) == macs
    model.up = Derived(3, 4, 2, 2)
    assert count_macs(model, torch.zeros(1, 3, 4, 4)) == macs


def test_linear_layers_count_however_they_are_called():
    """torchvision's Swin hands its layers' weights to a function; 4.5 G multiply-accumulates at 224 px, its paper says."""
    assert count_gflops(torchvision.models.get_model("swin_t", weights=None), 224) == pytest.approx(2 * 4.5, rel=0.03)


def test_a_row_with_a_least_size_builds_and_one_that_nobody_reads_is_not_kept():
    least = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 4]], [-1, 1, "nn.ReflectionPad2d", [12]], [-1, 1, "nn.AvgPool2d", [25, 1]]]
    assert tiny(backbone=least).max_stride == 8
    model = tiny(backbone=[*TINY["backbone"], [0, 1, "Conv", [16, 3, 2]]], head=[[[1], 1, "Detect", ["nc", "anchors"]]])
    assert 2 in model._last_used[2] and model(torch.zeros(1, 3, 64, 64))
    deeper = tiny(backbone=[*least, [-1, 1, "Conv", [16, 3, 4]], [-1, 1, "nn.Upsample", [None, 4, "nearest"]], [[-1, 3], 1, "Concat", [1]]])
    assert deeper.strides == (8,) and deeper.max_stride == 32
