"""TorchScript files: YOLOv5's own, damaged ones, and those whose program does more than compute."""
from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from exporting import assert_cut_off_is_told
from torch import Tensor, nn

from models.weights import open_weights
from models.yolo import DetectionModel
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.errors import UserError
from utils.export.backends import open_network
from utils.export.converters import _save, quiet, to_torchscript, trace
from utils.export.graph import InferenceGraph
from utils.export.metadata import KEY, ExportMetadata

IMAGES = torch.zeros(2, 3, 64, 96)


@pytest.fixture
def file(tiny, tmp_path: Path) -> Path:
    metadata = ExportMetadata.of(tiny, (64, 96), dynamic=False, precision="fp32", source="tiny.pt")
    to_torchscript(InferenceGraph(tiny), IMAGES, tmp_path / "tiny.torchscript", metadata)
    return tmp_path / "tiny.torchscript"


def test_what_yolov5s_readers_find(file: Path, tiny):
    extra = {KEY: "", "config.txt": ""}
    with quiet():
        module = torch.jit.load(file, _extra_files=extra)
    assert json.loads(extra["config.txt"]) == {"shape": [2, 3, 64, 96], "stride": 32, "names": {"0": "red", "1": "green"}}
    images = torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(module(images), tiny.decode(tiny(images)), rtol=1e-4, atol=1e-4)


class Yolov5s(nn.Module):
    """A tuple, as YOLOv5's exports give."""

    def __init__(self, network: DetectionModel) -> None:
        super().__init__()
        self.graph = InferenceGraph(network)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.graph(images),)


@pytest.mark.parametrize(("config", "fixed"), [
    ({"shape": [1, 3, 64, 64], "stride": 32, "names": {"0": "cat", "1": "dog"}}, (64, 64)),
    ({"shape": "?", "stride": 64, "names": ["cat", "dog"]}, None),
])  # fmt: skip
def test_yolov5s_own_file(config: dict, fixed: tuple[int, int] | None, tiny, tmp_path: Path):
    path, images = tmp_path / "a.torchscript", torch.rand(3, 3, 64, 64)
    with quiet():
        torch.jit.save(trace(Yolov5s(tiny), images[:1]), path, _extra_files={"config.txt": json.dumps(config)})
    network = open_network(path, names=lambda: pytest.fail("the file tells its names itself"))
    assert (network.names, network.fixed, network.max_stride, network.metadata) == (("cat", "dog"), fixed, config["stride"], None)
    torch.testing.assert_close(network(images), tiny.decode(tiny(images)), rtol=1e-4, atol=1e-4)


def test_a_file_without_names(tiny, tmp_path: Path):
    path = tmp_path / "a.torchscript"
    for text in (None, "", "[", "[1]", '{"names": 3}', "[" * 99999):
        with quiet():
            torch.jit.save(trace(InferenceGraph(tiny), IMAGES), path, _extra_files={} if text is None else {"config.txt": text})
        with pytest.raises(UserError, match=r"a\.torchscript: its metadata tells no class names .*--data"):
            open_network(path)
    network = open_network(path, names=lambda: ["cat", "dog"])
    assert network(torch.rand(1, 3, 64, 32)).shape == (1, 3 * (8 * 4 + 4 * 2 + 2), 7)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_files_cut_off(share: float, file: Path, capfd):
    assert_cut_off_is_told(file, share, r"tiny\.torchscript: is no TorchScript file, or cut off", capfd)


def rewritten(file: Path, change) -> Path:
    """The archive with each entry's bytes as `change(name, bytes)` gives them; None leaves one out."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            if content is not None:
                archive.writestr(name, content)
    return file


@pytest.mark.parametrize(("change", "words"), [
    (lambda name, content: None if "/code/" in name else content, "holds no program"),
    (lambda name, content: None if name.endswith("data.pkl") else content, "PyTorch can't load it"),
    (lambda name, content: b"def forward(" if name.endswith(".py") else content, "PyTorch can't load it"),
    (lambda name, content: content + b"\n# __setstate__" if name.endswith(".py") else content, "acts while it is loaded"),
    (lambda name, content: b"{}" if name.endswith(KEY) else content, f"its metadata {KEY} can't be read"),
])  # fmt: skip
def test_damaged_archives(change, words: str, file: Path):
    with pytest.raises(UserError, match=rf"tiny\.torchscript: .*{words}") as caught:
        open_network(rewritten(file, change), names=lambda: ["red", "green"])
    assert "\n" not in str(caught.value)


def test_a_checkpoint_by_another_name(tiny, tmp_path: Path):
    path = tmp_path / "best.torchscript"
    save_checkpoint(path, Checkpoint(tiny.spec.to_dict(), tiny.names, dict(tiny.state_dict())))
    with pytest.raises(UserError, match=r"best\.torchscript: is no TorchScript file: it holds no program"):
        open_network(path)


class Saves(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[0] > 0:
            torch.save(images, "stolen")
        return images


class Reads(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images + torch.from_file("secret", size=1)


class ActsAtOnce(nn.Module):
    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        torch.save(state[0], "stolen")
        self.training = state[1]

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize(("module", "words"), [
    (Saves, r"does more than compute \(aten::save\)"), (Reads, r"does more than compute \(aten::from_file\)"),
    (ActsAtOnce, "acts while it is loaded"),
])  # fmt: skip
def test_programs_that_do_more_than_compute(module: type[nn.Module], words: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with quiet():
        torch.jit.save(torch.jit.script(module().eval()), "a.torchscript")
    with pytest.raises(UserError, match=rf"a\.torchscript: its program {words}"):
        open_network("a.torchscript", names=lambda: ["cat"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.torchscript"]


@pytest.mark.parametrize("module", [nn.Flatten(), nn.Identity()])
def test_other_networks(module: nn.Module, tmp_path: Path):
    with quiet():
        torch.jit.save(trace(module.eval(), IMAGES), tmp_path / "a.torchscript")
    network = open_network(tmp_path / "a.torchscript", names=lambda: ["cat", "dog"])
    with pytest.raises(UserError, match=r"its output is .*, where a YOLOv5-like detector of its 2 classes has images x boxes x 7"):
        network(torch.rand(1, 3, 64, 64))


def test_no_other_device_and_no_other_size(file: Path):
    with pytest.raises(UserError, match=r"^--device 0: tiny\.torchscript runs on the CPU"):
        open_weights(str(file), "0", "fp32")
    weights = open_weights(str(file), "", "fp32")
    assert (weights.fixed, weights.names) == ((64, 96), ("red", "green")) and weights.description.startswith("TorchScript")
    with pytest.raises(UserError, match="takes images of 64x96 px only"):
        weights.image_size((128,))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device there")
def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tiny):
    """PyTorch's own writer aborts the process."""
    with pytest.raises(OSError, match="No space left"):
        _save(trace(InferenceGraph(tiny), IMAGES), Path("/dev/full"), {})
