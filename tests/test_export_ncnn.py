"""ncnn models: what the network finds, in ncnn's own runtime; and every way in which such a folder can be wrong."""
from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from exporting import assert_exports, job_of
from tiny import ANCHORS
from torch import Tensor

from models.weights import open_weights
from models.yolo import DetectionModel
from utils.errors import UserError
from utils.export import backends
from utils.export.backends import find_exported, is_exported, open_network
from utils.export.check import check_images
from utils.export.formats import FORMATS
from utils.export.metadata import KEY
from utils.export.produce import produce

for package in ("ncnn", "pnnx"):
    pytest.importorskip(package)
CPU = torch.device("cpu")
MODELS = Path(__file__).resolve().parents[1] / "models"


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    path = tmp_path / "tiny_ncnn_model"
    path.mkdir()
    FORMATS["ncnn"].write(job_of(tiny), path)
    return path


def test_what_is_written_and_found(folder: Path, tiny):
    assert sorted(path.name for path in folder.iterdir()) == ["metadata.yaml", "tiny.ncnn.bin", "tiny.ncnn.param"]
    content = yaml.safe_load((folder / "metadata.yaml").read_text())
    assert (content["names"], content["stride"], content["imgsz"]) == ({0: "red", 1: "green"}, 32, [64, 96])
    network = open_network(folder)
    assert network.metadata == job_of(tiny).metadata and network.fixed == network.imgsz == (64, 96) and network.names == tiny.names
    images = torch.rand(3, 3, 64, 96)  # one after another: ncnn has no batches
    torch.testing.assert_close(network.decode(network(images)), tiny.decode(tiny(images)), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="takes images of 64x96 px only"):
        network(torch.rand(1, 3, 96, 64))
    assert open_weights(str(folder), "", "fp32").description.startswith("ncnn ")


def test_threads_share_a_network(folder: Path, tiny, monkeypatch):
    monkeypatch.setattr(backends, "cpu_threads", lambda: 3)
    network = open_network(folder, at_once=3)
    batches = [torch.rand(1, 3, 64, 96) for _ in range(12)]
    expected = [tiny.decode(tiny(batch)) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for found, own in zip(pool.map(network, batches), expected, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_half_is_half_the_file(tiny, tmp_path: Path):
    sizes = []
    for precision in ("fp32", "fp16"):
        path = produce(job_of(tiny, (64, 64), precision), FORMATS["ncnn"], tmp_path / precision, check_images()[:2], tiny, CPU)
        sizes.append((path / "tiny.ncnn.bin").stat().st_size)
        found = open_network(path).description
        assert found.endswith(" threads, fp16 file") if precision == "fp16" else ", fp32, " in found and found.endswith(" threads")
    assert sizes[1] < 0.6 * sizes[0]


def test_one_size_only(tiny, tmp_path: Path):
    with pytest.raises(UserError, match=r"^ncnn: an ncnn graph holds one image size: leave out --dynamic$"):
        produce(job_of(tiny, dynamic=True), FORMATS["ncnn"], tmp_path / "a", [], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_ncnn_has_no_layer_for(tiny, tmp_path: Path):
    class Exotic(DetectionModel):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [torch.special.bessel_j0(raw) for raw in super().forward(images)]

    with pytest.raises(UserError, match=r"^ncnn: this network can't be converted: .*bessel_j0"):
        produce(job_of(Exotic(tiny.spec, tiny.names).eval()), FORMATS["ncnn"], tmp_path / "a", check_images()[:1], tiny, CPU)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["tiny.ncnn.param", "tiny.ncnn.bin"])
def test_files_cut_off(name: str, share: float, folder: Path, capfd):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"tiny\.ncnn\.param: ncnn can't load it, .*cut off") as caught:
        open_network(folder)
    assert "\n" not in str(caught.value) and "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(("change", "words"), [
    ({KEY: None}, None), ({KEY: None, "names": None}, "tells no class names"), ({"imgsz": [64]}, r"metadata\.yaml: its imgsz is no"),
    ({"imgsz": "64"}, "imgsz is no"), ({"imgsz": [32, 96]}, rf"metadata\.yaml: its imgsz and that in its {KEY} differ"),
    ({KEY: {"names": [datetime.date(2026, 1, 1)]}}, "can't be read"), ({KEY: [1]}, f"its metadata {KEY} can't be read"), ({KEY: {}}, "can't be read"),
])  # fmt: skip
def test_what_lies_beside_it(change: dict, words: str | None, folder: Path):
    content = yaml.safe_load((folder / "metadata.yaml").read_text()) | change
    (folder / "metadata.yaml").write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    if words is None:  # as another project writes it
        assert open_network(folder).names == ("red", "green") and open_network(folder).fixed == (64, 96)
    else:
        with pytest.raises(UserError, match=words):
            open_network(folder)


def test_what_is_missing(folder: Path):
    (folder / "metadata.yaml").rename(folder / "other.yaml")
    with pytest.raises(UserError, match=r"tiny\.ncnn\.param: metadata\.yaml is missing beside it, .*names, stride, imgsz"):
        open_network(folder)
    (folder / "tiny.ncnn.bin").unlink()
    with pytest.raises(UserError, match=r"its weights tiny\.ncnn\.bin are missing"):
        open_network(folder)
    (folder / "tiny.ncnn.param").unlink()
    with pytest.raises(UserError, match=r"tiny_ncnn_model: holds no \.xml files \(OpenVINO\) or \.ncnn\.param ones"):
        open_network(folder)


def test_a_folder_of_another_network(folder: Path):
    """Its graph has other inputs and outputs than pnnx gives."""
    graph = (folder / "tiny.ncnn.param").read_text()
    (folder / "tiny.ncnn.param").write_text(graph.replace("out0", "prob"))
    with pytest.raises(UserError, match="no ncnn model of pnnx"):
        open_network(folder)
    (folder / "tiny.ncnn.param").write_text(graph)
    (folder / "metadata.yaml").write_text("names: [a, b, c]\nstride: 32\nimgsz: [64, 96]\n")
    with pytest.raises(UserError, match="of its 3 classes has images x boxes x 8"):
        open_network(folder)(torch.rand(1, 3, 64, 96))


def test_which_files_are_exported(folder: Path):
    assert is_exported("x/best_ncnn_model/") and is_exported("best.ncnn.param") and not is_exported("best.param")
    assert find_exported(folder) == find_exported(folder / "tiny.ncnn.param") == folder / "tiny.ncnn.param"


# --- the networks that ship ----------------------------------------------------------------------------------------------------------------


def test_focus(tmp_path: Path):
    """The stem of YOLOv5's early files."""
    rows = [[-1, 1, "Focus", [8, 3]], *([-1, 1, "Conv", [8, 3, 2]] for _ in range(4))]
    content = {"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": ANCHORS, "backbone": rows,
               "head": [[[2, 3, 4], 1, "Detect", ["nc", "anchors"]]]}
    (tmp_path / "focus.yaml").write_text(yaml.safe_dump(content))
    assert_exports(str(tmp_path / "focus.yaml"), tmp_path, "ncnn")


YAMLS = sorted(str(path) for path in (*MODELS.glob("*.yaml"), *(MODELS / "hub").glob("*.yaml")))


@pytest.mark.slow
@pytest.mark.parametrize("cfg", YAMLS, ids=lambda path: Path(path).stem)
def test_every_yaml(cfg: str, tmp_path: Path):
    assert_exports(cfg, tmp_path, "ncnn")
