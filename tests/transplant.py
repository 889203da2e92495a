"""An ImageNet classifier's random weights moved into the rows of one of our YAMLs, and every stage compared."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.spec import load_spec
from models.yolo import DetectionModel

_SEEDS = {"yolov5s-timm-efficientnetv2-s": 1}  # others saturate its gates, where PyTorch's own float32 is pixels away from its float64


def sow(cfg: str) -> None:
    """Choose the start values of a model YAML's network."""
    torch.manual_seed(_SEEDS.get(Path(cfg).stem, 0))


def lived_in(model: nn.Module) -> nn.Module:
    """Batch norms as after a training, in eval mode: a norm in the wrong place or forgotten changes the output."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.7, 1.3), (module.bias, -0.2, 0.2), (module.running_mean, -0.3, 0.3),
                                      (module.running_var, 0.6, 1.6)):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def backbone(name: str) -> list[nn.Module]:
    """The blocks of a YAML's rows above SPPF, one after another, in eval mode."""
    spec = load_spec(name)
    end = next(layer.row for layer in spec.layers if layer.module == "SPPF")
    rows = DetectionModel(spec).eval().model[:end]
    return [block for row in rows for block in (row if type(row) is nn.Sequential else [row])]


def images(height: int = 96, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_same(ours: Tensor, theirs: Tensor, place: str = "") -> None:
    """Equal to 1e-5 of the largest value."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()), msg=lambda text: f"{place} {text}")


def assert_same_stages(blocks: Sequence[nn.Module], references: Iterable[nn.Module], stems: int = 1, size: tuple[int, int] = (96, 64)) -> Tensor:
    """Copy each reference's weights into our block, run both, compare after each; returns the last output.

    The first `stems` are matched by the order of their tensors, all others by name.
    """
    x = y = images(*size)
    for index, (block, reference) in enumerate(zip(blocks, references, strict=True)):
        weights = reference.state_dict()
        block.load_state_dict(dict(zip(block.state_dict(), weights.values(), strict=True)) if index < stems else weights)
        for ours, theirs in zip(norms(block), norms(reference), strict=True):
            ours.eps = theirs.eps  # a YAML's network has the detectors' own
        with torch.no_grad():
            x, y = block(x), reference(y)
        assert_same(x, y, f"block {index}:")
        assert y.std() > 1e-3, f"block {index}: nothing to compare"
    return x


def assert_trains(block: nn.Module, x: Tensor) -> None:
    """Gradients reach the input and every parameter."""
    block.train()
    x = x.requires_grad_()
    block(x * 1).square().sum().backward()  # `* 1`: an in-place activation may not change a leaf
    for tensor in (x, *block.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0
