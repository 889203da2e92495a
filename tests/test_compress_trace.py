"""Channels followed through small networks whose answer is known, and through every network YAML: what is cut equals what is zeroed."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from channels import Net, conv, graph_of
from test_models_blocks import EXAMPLES
from tiny import ANCHORS
from torch import Tensor, nn
from transplant import lived_in

from models.activations import _KNOWN as KNOWN_ACTIVATIONS
from models.fuse import fuse
from models.narrow import narrow
from models.prune import channel_graph, remove_channels
from models.spec import load_spec
from models.summary import count_gflops
from models.yolo import DetectionModel
from utils.compress.graph import ChannelGraph
from utils.compress.trace import KEPT, trace_channels

FILES = sorted(Path(__file__).resolve().parents[1].glob("models/**/*.yaml"))
LIGHT = ["yolov5n", "yolov5s-ghost", "yolov5s-shuffle", "yolov5n-ghostnet-0.5x", "yolov5n-mobilenetv3-small", "yolov5n-shufflenetv2-0.5x",
         "yolov5s-repghost", "yolov5s-repvgg-a0", "yolov5s-lcnet", "yolov5s-transformer", "yolov5s-timm-regnety-200mf", "yolov5s-timm-convnext-atto",
         "yolov5s-torchvision-mobilenetv3-small", "yolov3-tiny"]


def groups_of(net: nn.Module) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {group.name: (len(group.channels), group.layers) for group in graph_of(net).groups}


def test_a_chain():
    net = Net(lambda n, x: n.b(torch.relu(n.a(x))), a=conv(3, 4), b=conv(4, 2))
    assert groups_of(net) == {"a.weight": (4, ("a.weight",))}  # b makes the output
    uses = graph_of(net).uses
    assert np.array_equal(uses["b.weight"][1], uses["a.weight"][0]) and (uses["a.weight"][1] == KEPT).all() and (uses["b.bias"][0] == KEPT).all()


def test_a_sum_ties_its_inputs():
    net = Net(lambda n, x: n.c(n.a(x) + n.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    assert groups_of(net) == {"a.weight": (4, ("a.weight", "b.weight"))}


def test_a_concatenation_does_not():
    net = Net(lambda n, x: n.c(torch.cat((n.a(x), n.b(x)), 1)), a=conv(3, 4), b=conv(3, 2), c=conv(6, 2))
    graph = graph_of(net)
    assert {group.name: len(group.channels) for group in graph.groups} == {"a.weight": 4, "b.weight": 2}
    assert np.array_equal(graph.uses["c.weight"][1], np.concatenate([graph.uses["a.weight"][0], graph.uses["b.weight"][0]]))


def test_a_depthwise_convolution_follows_its_input():
    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, 4), b=conv(4, 8, 3, groups=4), c=conv(8, 2))
    graph = graph_of(net)
    assert [group.name for group in graph.groups] == ["a.weight"]
    assert np.array_equal(graph.uses["b.weight"][0], np.repeat(graph.uses["a.weight"][0], 2))


def test_the_groups_of_a_convolution_lose_the_same_channels():
    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, 6), b=conv(6, 4, 3, groups=2), c=conv(4, 2))
    graph = graph_of(net)
    assert {group.name: len(group.channels) for group in graph.groups} == {"a.weight": 3, "b.weight": 2}
    a = graph.uses["a.weight"][0]
    assert np.array_equal(a[:3], a[3:])


def test_a_shuffle_is_the_permutation_that_it_is():
    def forward(n: Net, x: Tensor) -> Tensor:
        return n.c(torch.stack((n.a(x), n.b(x)), 2).flatten(1, 2))

    graph = graph_of(Net(forward, a=conv(3, 2), b=conv(3, 2), c=conv(4, 2)))
    a, b = graph.uses["a.weight"][0], graph.uses["b.weight"][0]
    assert graph.uses["c.weight"][1].tolist() == [a[0], b[0], a[1], b[1]]


@pytest.mark.parametrize("mix", [
    lambda n, x: x.softmax(1), lambda n, x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1), lambda n, x: nn.functional.layer_norm(x, x.shape[1:]),
    lambda n, x: torch.cat((x[:, 2:], x[:, :2]), 1), lambda n, x: x.cumsum(1), lambda n, x: x * n.scale, lambda n, x: x / (1 + x.abs()),
    lambda n, x: written(x), lambda n, x: x.mT.mT, lambda n, x: x.data, lambda n, x: nn.functional.conv2d(x, n.filters),
    lambda n, x: nn.functional.linear(x.mean((2, 3)), n.filters[:, :, 0, 0])[..., None, None],
    lambda n, x: nn.functional.linear(x.movedim(1, 3), n.matrix).movedim(3, 1), lambda n, x: nn.functional.batch_norm(x, n.mean, n.mean),
], ids=["softmax", "mean over channels", "layer norm", "slices by number", "cumulative sum", "learned scale", "division", "written slice", "mT",
        "data", "own convolution", "computed matrix", "own matrix", "own norm"])  # fmt: skip
def test_what_needs_every_channel_keeps_it(mix):
    net = Net(lambda n, x: n.b(mix(n, n.a(x))), a=conv(3, 4), b=conv(4, 2))
    net.scale, net.filters, net.matrix = (nn.Parameter(torch.ones(shape)) for shape in ((4, 1, 1), (4, 4, 1, 1), (4, 4)))
    net.register_buffer("mean", torch.ones(4))
    graph = graph_of(net)
    assert graph.groups == () and graph.kept_whole


@pytest.mark.parametrize("follow", [
    *(lambda n, x, act=act: act()(x) for act in KNOWN_ACTIVATIONS.values() if act is not nn.PReLU),
    lambda n, x: x * nn.functional.relu6(x + 3) / 6, lambda n, x: x / x.sigmoid(), lambda n, x: 1 / (1 - x), lambda n, x: x.to(n.scale),
    lambda n, x: x.clamp(max=n.one),
], ids=[*(name for name in KNOWN_ACTIVATIONS if name != "PReLU"), "hard swish by hand", "quotient", "of a number", "to", "one bound"])  # fmt: skip
def test_what_each_channel_does_alone_keeps_none(follow):
    net = Net(lambda n, x: n.b(follow(n, n.a(x))), a=conv(3, 4), b=conv(4, 2))
    net.scale, net.one = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(1))
    assert groups_of(net) == {"a.weight": (4, ("a.weight",))} and not graph_of(net).kept_whole


@pytest.mark.parametrize("mix", [lambda n, x: x * n.scale.to(x), lambda n, x: n.scale.to(x) * x, lambda n, x: x * n.scale.type_as(x),
                                 lambda n, x: x.clamp(max=n.scale.float())])
def test_a_scale_that_is_brought_to_its_inputs_type_is_still_one(mix):
    net = Net(lambda n, x: n.b(mix(n, n.a(x))), a=conv(3, 4), b=conv(4, 2))
    net.scale = nn.Parameter(torch.ones(4, 1, 1, dtype=torch.float64))
    assert groups_of(net) == {} and graph_of(net).kept_whole


def test_a_gate_of_one_channel_ties_nothing_and_stays():
    net = Net(lambda n, x: n.c(n.b(y := n.a(x)) * n.g(y).sigmoid()), a=conv(3, 4), b=conv(4, 5), g=conv(4, 1), c=conv(5, 2))
    assert groups_of(net) == {"a.weight": (4, ("a.weight",)), "b.weight": (5, ("b.weight",))}
    graph = graph_of(net)
    assert [*graph.kept_whole.values()] == ["__mul__ over all channels"] or [*graph.kept_whole.values()] == ["mul over all channels"]
    assert "g.weight" in graph.whole


def written(x: Tensor) -> Tensor:
    """Some channels of a tensor are overwritten in place."""
    x = x.clone()
    x[:, :2] = x[:, :2] * 2
    return x


@pytest.mark.parametrize("overwrite", [lambda n, x: x[:, :4], lambda n, x: torch.zeros_like(x)], ids=["itself", "a buffer"])
def test_channels_that_are_written_into_a_slice_are_kept(overwrite):
    def forward(n: Net, x: Tensor) -> Tensor:
        y = overwrite(n, n.a(x))
        y[:, :2] = n.b(x)
        return n.c(y)

    assert graph_of(Net(forward, a=conv(3, 4), b=conv(3, 2), c=conv(4, 2))).groups == ()


def test_tokens_by_view():
    """Channels and places become one dimension, whose numbers are no view of the channels'."""
    net = Net(lambda n, x: n.b(torch.relu(n.a(x)).view(len(x), -1)), a=conv(3, 4), b=nn.Linear(4 * 64, 2))
    assert graph_of(net).groups == ()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm1d])
def test_any_batch_norm_is_narrowed(norm):
    options = {} if norm is not nn.InstanceNorm1d else {"affine": True, "track_running_stats": True}
    net = Net(lambda n, x: n.b(n.norm(n.a(x).flatten(2) if norm is not nn.BatchNorm2d else n.a(x)).view(len(x), -1, *x.shape[2:])),
              a=conv(3, 4), norm=norm(4, **options), b=conv(4, 2))
    graph = graph_of(net)
    assert groups_of(net) == {"a.weight": (4, ("a.weight",))}
    keep = graph.keep({"a.weight": np.array([True, False, True, True])})
    left = Net(net.body, a=conv(3, 4), norm=norm(4, **options), b=conv(4, 2)).eval()
    narrow(left, graph.widths(net, keep, {}), "by hand")
    left.load_state_dict(graph.cut(net.state_dict(), keep))
    assert left.norm.num_features == 3 and left(torch.rand(2, 3, 8, 8)).shape == (2, 2, 8, 8)


@pytest.mark.parametrize("times", [2, 3])
def test_weights_used_again_are_kept(times: int):
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.a(x)
        for _ in range(times):
            x = n.b(x)
        return n.c(x)

    assert graph_of(Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2))).groups == ()


def test_a_norm_that_two_branches_share_ties_them():
    net = Net(lambda n, x: n.c(torch.cat((n.norm(n.a(x)), n.norm(n.b(x))), 1)), a=conv(3, 4), b=conv(3, 4), norm=nn.BatchNorm2d(4), c=conv(8, 2))
    assert groups_of(net) == {"a.weight": (4, ("a.weight", "b.weight"))}


def test_a_norm_whose_scale_does_something_else_too_is_kept():
    net = Net(lambda n, x: n.b(n.norm(n.a(x)) * n.norm.weight.view(4, 1, 1)), a=conv(3, 4), norm=nn.BatchNorm2d(4), b=conv(4, 2))
    assert graph_of(net).groups == ()


def test_costs_by_hand():
    net = Net(lambda n, x: n.b(torch.relu(n.a(x))), a=conv(3, 4, 3), b=conv(4, 2))
    graph = graph_of(net)
    assert graph.macs(graph.everything) == 64 * (3 * 9 * 4 + 4 + 4 * 2 + 2)  # biases too
    keep = graph.keep({"a.weight": np.array([True, False, True, False])})
    assert graph.macs(keep) == 64 * (3 * 9 * 2 + 2 + 2 * 2 + 2)
    assert graph.parameters(keep, ["a.weight", "a.bias", "b.weight", "b.bias"]) == 3 * 9 * 2 + 2 + 2 * 2 + 2


def check(name: str, seed: int = 0) -> None:
    torch.manual_seed(seed)
    check_model(lived_in(DetectionModel(load_spec(f"{name}.yaml", 3))), seed)


def check_model(model: DetectionModel, seed: int) -> DetectionModel:
    """Random channels at random shares: the network that is left equals the whole one with those channels zeroed, at Detect's inputs."""
    graph = channel_graph(model)
    rng = np.random.default_rng(seed)
    chosen = {}
    for group in graph.groups:
        kept = rng.random(len(group.channels)) < rng.uniform(0.3, 1)
        kept[rng.integers(len(kept))] = True
        chosen[group.name] = kept
    keep = graph.keep(chosen)
    left = remove_channels(model, graph, keep)
    weights = [key for key, _ in model.named_parameters()]
    assert sum(p.numel() for p in left.parameters()) == graph.parameters(keep, weights) < sum(p.numel() for p in model.parameters())

    zeroed = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for key, dims in graph.uses.items():
        for dim, channels in enumerate(dims):
            if channels is not None:
                zeroed[key].index_fill_(dim, torch.from_numpy(np.flatnonzero(~keep[channels])), 0)
    model.load_state_dict(zeroed)
    side = 2 * model.max_stride
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    wanted, found = features(model, images), features(left, images)
    for n, (a, b) in enumerate(zip(wanted, found, strict=True)):
        a = a[:, torch.from_numpy(keep[graph.uses[f"model.{len(model.model) - 1}.m.{n}.weight"][1]])]
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    return left


def features(model: DetectionModel, images: Tensor) -> list[Tensor]:
    """Detect's inputs."""
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen


@pytest.mark.parametrize("name", LIGHT)
def test_cut_equals_zeroed_light(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cut_equals_zeroed(path: Path) -> None:
    for seed in (1, 2):
        check(path.stem, seed)


IN_OTHER_SIZES = {  # arguments that leave a map between others of a network, where those of test_models_blocks.py do not
    "Bottleneck": [16], "BottleneckCSP": [16], "C3": [16], "C3Ghost": [16], "C3SPP": [16], "C3TR": [16], "C3x": [16], "SPP": [16, [5, 9, 13]],
    "nn.AdaptiveAvgPool2d": [16], "nn.AdaptiveMaxPool2d": [16], "nn.BatchNorm2d": [], "nn.InstanceNorm2d": [], "SE": [0.25],
}  # fmt: skip


KEPT_WHOLE = {"C3TR": {"model.1.m.layers.0.norm1", "model.1.m.layers.0.norm2"}, "Expand": {"model.1"}}  # what they do needs every channel


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"Concat", "ADD", "nn.ReflectionPad2d", "nn.ReplicationPad2d", "nn.ZeroPad2d"}))
def test_every_block_loses_channels(name: str, tmp_path: Path) -> None:
    """Between convolutions whose channels are removed: what is left equals the whole with those zeroed."""
    channels, args, _ = EXAMPLES[name]
    args = IN_OTHER_SIZES.get(name, args)
    rows: list[list] = [] if name in ("Focus", "GhostStem", "conv_bn_relu_maxpool", "MobileStem") else [[-1, 1, "Conv", [channels[0], 3, 2]]]
    rows += [[-1, 1, name, args], [-1, 1, "Conv", [16, 3, 2]]]
    rows += [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]]
    last = len(rows) - 1
    content = {"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": ANCHORS, "backbone": rows,
               "head": [[[last - 2, last - 1, last], 1, "Detect", ["nc", "anchors"]]]}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(content))
    torch.manual_seed(0)
    model = lived_in(DetectionModel(load_spec(tmp_path / "net.yaml", 2)))
    assert channel_graph(model).kept_whole.keys() - {f"model.{last + 1}"} == KEPT_WHOLE.get(name, set()), "but for Detect"
    check_model(check_model(model, 0), 1)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "ghostnetv3_100"])
def test_what_is_left_of_timms_branches_is_merged(name: str, tmp_path: Path):
    """A branch that is a norm alone has the channels that are left, not those that its block was made with."""
    rows = [[-1, 1, "Timm", [name, {"out": [2, 3, 4]}]], *([0, 1, "Level", [n]] for n in range(3))]
    content = {"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": ANCHORS, "backbone": rows,
               "head": [[[1, 2, 3], 1, "Detect", ["nc", "anchors"]]]}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(content))
    torch.manual_seed(0)
    left = check_model(lived_in(DetectionModel(load_spec(tmp_path / "net.yaml", 2))), 0)
    folded = fuse(left)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    images = torch.rand(1, 3, 64, 96)
    for a, b in zip(features(folded, images), features(left, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_products_within_attention_stay(tmp_path: Path):
    rows = [*([-1, 1, "Conv", [32, 3, 2]] for _ in range(3)), [-1, 1, "C3TR", [32]]]
    content = {"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3, "backbone": rows, "head": [[[3], 1, "Detect", ["nc", "anchors"]]]}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(content))
    model = lived_in(DetectionModel(load_spec(tmp_path / "net.yaml", 2)))
    graph = channel_graph(model, 256)
    keep = graph.keep({group.name: np.arange(len(group.channels)) % 2 == 0 for group in graph.groups})
    left = remove_channels(model, graph, keep)
    assert count_gflops(left, 256) < 0.9 * count_gflops(model, 256)
    for network, chosen in ((model, graph.everything), (left, keep)):
        assert 2 * graph.macs(chosen) / 1e9 == pytest.approx(count_gflops(network, 256), rel=2e-3)
    assert graph.macs(graph.everything) > 1.05 * ChannelGraph(trace_channels(model, torch.zeros(1, 3, 256, 256)), graph.shapes).macs(graph.everything)


@pytest.mark.parametrize("name", ["yolov5s-shuffle", "yolov5n-ghost"])
def test_a_pruned_network_is_pruned_again(name: str):
    torch.manual_seed(0)
    model = lived_in(DetectionModel(load_spec(f"{name}.yaml", 3)))
    groups = {group.name for group in channel_graph(model).groups}
    for seed in (0, 1, 2):
        left = check_model(model, seed)
        # As much can be removed as before; a depthwise convolution of one channel is an ordinary one.
        assert groups <= {group.name for group in channel_graph(left).groups}
        model = DetectionModel(left.spec)  # from its spec alone
        model.load_state_dict(left.state_dict())
        model = model.eval().to(memory_format=torch.channels_last)  # as `left` is: another layout sums in another order
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            for a, b in zip(left(images), model(images), strict=True):
                assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_pruned_shuffle_is_followed_on_a_gpu():
    """Its order lies there, the numbers on the CPU."""
    torch.manual_seed(0)
    left = check_model(lived_in(DetectionModel(load_spec("yolov5s-shuffle.yaml", 3))), 0)
    wanted, found = channel_graph(left), channel_graph(left.cuda())
    assert [group.name for group in found.groups] == [group.name for group in wanted.groups]
    assert all(np.array_equal(a.channels, b.channels) for a, b in zip(found.groups, wanted.groups, strict=True))
