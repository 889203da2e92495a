"""Ghost blocks against their paper's arithmetic, hand-worked widths and timm's GhostNet."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.ghost import GBneck, GhostBottleneck, GhostConv, GhostModule, GhostStem, ghost_widths
from models.spec import ModelSpec, load_spec
from models.yolo import DetectionModel


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("c2, ratio, primary, cheap", [(16, 2, 8, 8), (7, 2, 4, 4), (7, 3, 3, 6), (12, 4, 3, 9), (5, 8, 1, 7)])
def test_widths_by_hand(c2, ratio, primary, cheap):
    assert ghost_widths(c2, ratio) == (primary, cheap)
    for cls in (GhostConv, GhostModule):
        assert cls(6, c2, 3, ratio=ratio)(torch.randn(2, 6, 5, 5)).shape == (2, c2, 5, 5)


def test_output_is_primary_maps_then_cheap_ones_cut_to_c2():
    ghost = GhostConv(4, 7, ratio=3, dw_size=3).eval()
    x = torch.randn(1, 4, 6, 6)
    primary = ghost.cv1(x)
    torch.testing.assert_close(ghost(x), torch.cat((primary, ghost.cv2(primary)[:, :4]), 1))


@pytest.mark.parametrize("ratio, dw_size", [(2, 5), (2, 3), (4, 3)])
def test_size_is_the_papers(ratio, dw_size):
    """Section 3.1: n/s * c * k * k weights in the primary convolution, (s - 1) * n/s * d * d in the cheap filters; here two of batch norm a map."""
    c1, c2, k = 32, 64, 3
    expected = c2 // ratio * c1 * k * k + (ratio - 1) * c2 // ratio * dw_size**2 + 2 * c2
    assert parameters(GhostConv(c1, c2, k, ratio=ratio, dw_size=dw_size)) == expected
    assert parameters(GhostModule(c1, c2, k, ratio=ratio, dw_size=dw_size)) == expected


def test_yaml_row_sets_ratio_and_filter_size():
    content = {
        "nc": 2, "anchors": 3,
        "backbone": [[-1, 1, "GhostConv", [16, 3, 2, {"ratio": 4, "dw_size": 3}]], [-1, 2, "C3Ghost", [32, {"ratio": 4, "dw_size": 7}]]],
        "head": [[[1], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip
    conv, c3 = DetectionModel(ModelSpec.from_dict(content, "row")).model[:2]
    assert (conv.cv1.conv.out_channels, conv.cv2.conv.out_channels, conv.cv2.conv.kernel_size) == (4, 12, (3, 3))
    inner = c3.m[1].conv[0]
    assert (inner.cv1.conv.out_channels, inner.cv2.conv.out_channels, inner.cv2.conv.kernel_size) == (2, 6, (7, 7))


@pytest.mark.parametrize("c1, c2, stride, depthwise", [(8, 8, 1, False), (8, 12, 1, False), (8, 8, 2, True)])
def test_bottlenecks_are_depthwise_at_stride_2_only_and_fit_any_shortcut(c1, c2, stride, depthwise):
    for block in (GhostBottleneck(c1, c2, 3, stride), GBneck(c1, c2, 3, 16, 0.25, stride)):
        middle = block.conv[1] if isinstance(block, GhostBottleneck) else block.conv_dw
        assert isinstance(middle, nn.Identity) != depthwise
        assert isinstance(block.shortcut, nn.Identity) == (c1 == c2 and stride == 1)
        assert block(torch.randn(2, c1, 8, 8)).shape == (2, c2, 8 // stride, 8 // stride)


def test_relu_follows_the_first_module_only():
    block = GBneck(8, 8, 3, 16)
    assert any(isinstance(m, nn.ReLU) for m in block.ghost1.modules())
    assert not any(isinstance(m, nn.ReLU) for m in block.ghost2.modules())


# GhostNet itself: output widths of stem and 16 bottlenecks, from the paper's table 7 times the width, to multiples of 4.
WIDTHS = {
    0.5: [8, 8, 12, 12, 20, 20, 40, 40, 40, 40, 56, 56, 80, 80, 80, 80, 80],
    1.0: [16, 16, 24, 24, 40, 40, 80, 80, 80, 80, 112, 112, 160, 160, 160, 160, 160],
    1.3: [20, 20, 32, 32, 52, 52, 104, 104, 104, 104, 144, 144, 208, 208, 208, 208, 208],
}


def ghostnet_detector(width: float) -> DetectionModel:
    content = load_spec("yolov5s-ghostnet.yaml").to_dict()
    return DetectionModel(ModelSpec.from_dict(content | {"width_multiple": width}, "ghostnet")).eval()


@pytest.fixture(scope="module", params=WIDTHS)
def detector(request) -> tuple[float, DetectionModel]:
    return request.param, ghostnet_detector(request.param)


def test_backbone_has_the_papers_widths(detector):
    width, model = detector
    assert [shape[0] for shape in model.row_shapes[:17]] == WIDTHS[width]
    assert model.strides == (8, 16, 32)


@pytest.mark.parametrize("width, name", [(0.5, "yolov5n-ghostnet-0.5x.yaml"), (1.3, "yolov5s-ghostnet-1.3x.yaml")])
def test_other_sizes_yamls_are_the_papers(width, name):
    """The widths written out in them are those of the 1.0x file at that multiple, which timm's weights fit."""
    ours, scaled = (model.model[:17].state_dict() for model in (DetectionModel(load_spec(name)), ghostnet_detector(width)))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in scaled.items()}


def test_classifier_of_our_rows_has_the_papers_size():
    """5.18 M parameters and 141 M multiply-accumulates at 224 px, with the paper's classifier behind our stem and bottlenecks."""
    rows = list(ghostnet_detector(1.0).model[:17])
    assert isinstance(rows[0], GhostStem)
    tail = nn.Sequential(
        nn.Conv2d(160, 960, 1, bias=False), nn.BatchNorm2d(960), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(960, 1280, 1), nn.ReLU(), nn.Conv2d(1280, 1000, 1),
    )  # fmt: skip
    net = nn.Sequential(*rows, tail).eval()
    assert parameters(net) == 5_182_508

    macs = 0

    def count(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, 3, 224, 224))
    assert round(macs / 1e6) == 141


def test_timms_weights_fit_and_give_timms_features(detector):
    timm = pytest.importorskip("timm", reason="the oracle: pip install timm")
    width, model = detector
    torch.manual_seed(0)
    oracle = timm.create_model(f"ghostnet_{round(width * 100):03d}", pretrained=False).eval()
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    rows = model.model[:17]
    for module in rows.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5  # ImageNet weights expect their own
    rows[0].conv.load_state_dict(oracle.conv_stem.state_dict())
    rows[0].bn.load_state_dict(oracle.bn1.state_dict())
    stages = oracle.blocks[:9]
    for row, block in zip(rows[1:], (block for stage in stages for block in stage), strict=True):
        row.load_state_dict(block.state_dict())

    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = stages(oracle.act1(oracle.bn1(oracle.conv_stem(x))))
        for row in rows:
            x = row(x)
    torch.testing.assert_close(x, expected)
