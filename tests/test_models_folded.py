"""A network without its batch norms as one to keep: rebuilt from its spec, trained, pruned before and after."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model
from transplant import lived_in, norms, sow

from models.prune import channel_graph, remove_channels
from models.spec import ModelSpec, load_spec
from models.yolo import DetectionModel, build_for_training, model_from_checkpoint
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import ROOT

LIGHT = ["yolov5n", "yolov5s-shuffle", "yolov5s-repvgg-a0"]
FILES = sorted(path.stem for path in ROOT.glob("models/**/*.yaml"))


def network(name: str) -> DetectionModel:
    sow(f"{name}.yaml")
    return lived_in(DetectionModel(load_spec(f"{name}.yaml", 2), ("red", "green")))


def rebuilt(model: DetectionModel) -> DetectionModel:
    """As a checkpoint brings it back."""
    return model_from_checkpoint(Checkpoint(model.spec.to_dict(), model.names, model.state_dict()), "it.pt")


def assert_same(a: DetectionModel, b: DetectionModel) -> None:
    images = torch.rand(1, 3, 2 * a.max_stride, 2 * a.max_stride)
    with torch.no_grad():
        for x, y in zip(a(images), b(images), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def thinned(model: DetectionModel, seed: int) -> DetectionModel:
    """What is left where some channels of each group are removed."""
    graph, rng = channel_graph(model), np.random.default_rng(seed)
    chosen = {group.name: rng.random(len(group.channels)) < 0.7 for group in graph.groups}
    for kept in chosen.values():
        kept[:2] = True
    return remove_channels(model, graph, graph.keep(chosen))


def check(name: str) -> None:
    """Folded, rebuilt; pruned, folded, rebuilt; folded, pruned, rebuilt."""
    model = network(name)
    folded = model.folded()
    assert not model.spec.fused and folded.spec.fused and folded.folded() is folded and len(norms(folded)) < len(norms(model))
    assert all(p.requires_grad for p in folded.parameters()) and all(p.grad_fn is None for p in folded.parameters())
    assert_same(model, folded)
    again = rebuilt(folded)
    assert again.spec == ModelSpec.from_dict(folded.spec.to_dict(), "it.pt") and all(p.requires_grad for p in again.parameters())
    assert [(key, tuple(t.shape)) for key, t in again.state_dict().items()] == [(key, tuple(t.shape)) for key, t in folded.state_dict().items()]
    assert_same(folded, again)

    pruned = thinned(model, 0)
    left = pruned.folded()
    assert left.spec.widths and left.spec.fused
    assert_same(pruned, rebuilt(left))
    twice = thinned(left, 1)
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in left.parameters())
    assert_same(twice, rebuilt(twice))
    assert twice.row_shapes == rebuilt(twice).row_shapes


@pytest.mark.parametrize("name", LIGHT)
def test_light_networks(name: str):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_network(name: str):
    check(name)


def test_random_start_has_the_heads_own_biases(tmp_path):
    """A folded network's YAML can be built without weights, too."""
    model = DetectionModel(replace(tiny_model(tmp_path).spec, fused=True))
    plain = tiny_model(tmp_path)
    assert model.training and norms(model) == [] and model.strides == plain.strides and model.row_shapes == plain.row_shapes
    for own, other in zip(model.head.m, plain.head.m, strict=True):
        assert (own.bias.view(3, -1)[:, 4] - other.bias.view(3, -1)[:, 4]).abs().max() < 1  # the prior of few objects, beside a random start


def test_other_classes_and_files(tmp_path):
    model = lived_in(tiny_model(tmp_path)).folded()
    path = tmp_path / "folded.pt"
    save_checkpoint(path, Checkpoint(model.spec.to_dict(), model.names, model.state_dict()))
    assert load_checkpoint(path).spec["fused"] is True and torch.load(path, weights_only=True)["spec"]["fused"] is True
    other, transfer = build_for_training("", str(path), ("a", "b", "c"))
    assert other.spec.fused and other.spec.nc == 3 and all(".m." in key for key in transfer.left)
    (tmp_path / "folded.yaml").write_text(model.spec.to_yaml())
    assert load_spec(tmp_path / "folded.yaml").to_dict() == model.spec.to_dict()
    assert "fused" not in tiny_model(tmp_path).spec.to_dict()
    with pytest.raises(UserError, match=r"^my\.yaml: fused must be true or false, found 'yes'$"):
        ModelSpec.from_dict(model.spec.to_dict() | {"fused": "yes"}, "my.yaml")
