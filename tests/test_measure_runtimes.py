"""Every runtime that is installed makes what eager PyTorch makes; what fails says where and why."""
from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from models.spec import load_spec
from models.yolo import DetectionModel
from utils.errors import UserError
from utils.measure import runtimes
from utils.measure.runtimes import RUNTIMES, Runtime, choose_runtimes

BF16 = RUNTIMES[1]
BY_NAME = {runtime.name: runtime for runtime in RUNTIMES}


def installed(name: str) -> Runtime:
    reason = BY_NAME[name].missing(asked=True)
    if reason:
        pytest.skip(reason)
    return BY_NAME[name]


@pytest.fixture(scope="module", params=["yolov5n.yaml", "yolov5s-shuffle.yaml", "yolov5s-transformer.yaml"])
def case(request) -> tuple[nn.Module, Tensor, Sequence[Tensor]]:
    """A fused network whose maps depend on the image, two wide images, and eager PyTorch's maps of them."""
    torch.manual_seed(0)
    model = DetectionModel(load_spec(request.param))
    images = torch.rand(2, 3, 64, 96)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of these images
    with torch.no_grad():
        model(images)
    network = model.eval().fused().requires_grad_(False)
    maps = network(images)
    assert all((m[0] - m[1]).abs().max() > 0.1 for m in maps)
    return network, images, maps


@pytest.fixture
def no_onnxscript(monkeypatch) -> None:
    """PyTorch's newer exporter, which takes seconds, has no part in it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find_spec(name, *rest))


def largest_difference(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    assert [m.shape for m in maps] == [m.shape for m in expected]
    return max(float((a.float() - b).abs().max()) for a, b in zip(maps, expected, strict=True))


@pytest.mark.parametrize("name", BY_NAME)
def test_maps_are_those_of_eager_pytorch(name: str, case, no_onnxscript):
    runtime, (network, images, expected) = installed(name), case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = runtime.prepare(network, images)
    maps = run()
    assert [m.shape for m in maps] == [m.shape for m in expected]
    differences = [(a.float() - b).abs() for a, b in zip(maps, expected, strict=True)]
    if name == BF16.name:  # three decimal digits, and sixty layers that lose some of them
        assert all(0.001 < d.mean() / b.std() < 0.4 for d, b in zip(differences, expected, strict=True))
    else:
        assert max(d.max() for d in differences) < 1e-3
    again = run()
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_network_with_gradients_and_a_batch_of_one(name: str, tmp_path: Path):
    network = tiny_model(tmp_path).eval().fused()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
    assert largest_difference(installed(name).prepare(network, images)(), expected) < (0.1 if name == BF16.name else 1e-3)


class Failing(nn.Module):
    def forward(self, images: Tensor) -> list[Tensor]:
        raise ValueError("no room for an\n odd image")


@pytest.mark.parametrize("name", BY_NAME)
def test_a_failure_names_runtime_and_reason(name: str, no_onnxscript):
    runtime = installed(name)
    with pytest.raises(UserError, match=f"^{name}: this network does not run in it: .*no room for an"):
        runtime.prepare(Failing(), torch.rand(1, 3, 8, 8))
    assert torch.backends.mha.get_fastpath_enabled()


class Exotic(nn.Conv2d):
    def forward(self, images: Tensor) -> list[Tensor]:
        return [torch.special.bessel_j0(super().forward(images))]


@pytest.mark.parametrize("name", ["ONNX Runtime", "OpenVINO"])
def test_an_operator_that_only_pytorch_knows(name: str, no_onnxscript, capfd):
    runtime = installed(name)
    with pytest.raises(UserError, match=f"^{name}: .*bessel_j0") as caught:
        runtime.prepare(Exotic(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
    assert name != "ONNX Runtime" or "pip install onnxscript" in str(caught.value)
    print("still heard", flush=True)
    assert capfd.readouterr().out == "still heard\n"


def test_the_newer_exporter_where_the_older_fails(tmp_path: Path, monkeypatch, capfd):
    pytest.importorskip("onnxscript", reason="PyTorch's newer ONNX exporter: pip install onnxscript")
    runtime, export = installed("ONNX Runtime"), torch.onnx.export

    def newer_only(*args, dynamo: bool, **options):
        if not dynamo:
            raise RuntimeError("is gone")
        return export(*args, dynamo=True, **options)

    monkeypatch.setattr(torch.onnx, "export", newer_only)
    network, images = tiny_model(tmp_path).eval().fused(), torch.rand(1, 3, 64, 64)
    maps = runtime.prepare(network, images)()
    with torch.no_grad():
        assert largest_difference(maps, network(images)) < 1e-3
    assert capfd.readouterr().out == ""


def test_no_package_reports_its_use_over_the_network(tmp_path: Path):
    network = tiny_model(tmp_path).eval().fused()
    for name in ("ONNX Runtime", "OpenVINO"):
        installed(name).prepare(network, torch.rand(1, 3, 64, 64))
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    assert sys.modules["openvino.tools.ovc.telemetry_utils"].tm.__name__.endswith("telemetry_stub")


def test_what_is_not_installed_says_how_to_get_it(monkeypatch):
    absent = Runtime("Odd Engine", runtimes._torchscript, ("os", "no_such_package", "nor_this_one"))
    assert absent.missing() == absent.missing(asked=True) == "Odd Engine: pip install no_such_package nor_this_one"
    monkeypatch.setattr(runtimes, "RUNTIMES", (RUNTIMES[0], absent))
    assert choose_runtimes() == ([RUNTIMES[0]], ["Odd Engine: pip install no_such_package nor_this_one"])
    assert choose_runtimes(["odd-engine"]) == ([], ["Odd Engine: pip install no_such_package nor_this_one"])


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bf16_only_for_those_who_ask(native: bool, monkeypatch):
    monkeypatch.setattr(runtimes, "cpu_has_native_bf16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtimes, "RUNTIMES", RUNTIMES[:2])
    chosen, reasons = choose_runtimes()
    assert (BF16 in chosen) == native and RUNTIMES[0] in chosen
    assert native or "no bf16 instructions" in reasons[0]
    assert choose_runtimes(["PyTorch BF16"]) == ([BF16], [])


def test_runtimes_of_the_cpu_are_left_out_on_another_device(monkeypatch):
    away = Runtime("Engine", runtimes._onnxruntime, ("os",))
    monkeypatch.setattr(runtimes, "RUNTIMES", (*RUNTIMES[:2], away))
    monkeypatch.setattr(runtimes, "has_bf16", lambda device: device.index == 0)
    assert choose_runtimes(device="cuda:0") == ([*RUNTIMES[:2]], ["Engine: runs on the CPU only: --device cpu measures it"])
    assert choose_runtimes(device="cuda:1")[1][0] == "PyTorch bf16: this GPU has no bf16 instructions: it would be emulated, slower than fp32"
    assert choose_runtimes(["engine"], "cpu") == ([away], [])


def test_runtimes_by_name():
    assert choose_runtimes(["torch-script", "pytorchfp32", "torch-script"])[0] == [BY_NAME["TorchScript"], BY_NAME["PyTorch fp32"]]
    with pytest.raises(UserError, match="open vinno: no such runtime; did you mean openvino"):
        choose_runtimes(["open vinno"])


@pytest.mark.parametrize("name", BY_NAME)
def test_description_names_version_precision_and_threads(name: str):
    text = installed(name).describe()
    assert text.startswith(name.removesuffix(" fp32").removesuffix(" bf16") + " ")
    assert text.endswith(f", {'bf16' if name == BF16.name else 'fp32'}, 1 threads")
    assert text.split(", ")[0].split()[-1][0].isdigit()
