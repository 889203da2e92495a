"""Ways to run a network on this machine, behind one interface: PyTorch, TorchScript, ONNX Runtime and OpenVINO."""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from utils.cpu import cpu_has_native_bf16
from utils.device import PRECISION, autocast, has_bf16
from utils.errors import UserError, short_reason
from utils.export.converters import quiet, to_onnx, to_openvino, trace
from utils.extras import import_extra, pip_install
from utils.files import did_you_mean
from utils.signals import keep_signal_stack

Run = Callable[[], Sequence[Tensor]]  # one batch to its raw maps, done when it returns; the next run may overwrite them
_LONGEST_REASON = 400  # characters


@dataclass(frozen=True)
class Runtime:
    """One way to run a network; with as many threads as PyTorch has."""

    name: str
    make: Callable[[nn.Module, Tensor], Run]
    packages: tuple[str, ...] = ()  # beyond PyTorch
    dtype: torch.dtype = torch.float32

    def missing(self, asked: bool = False, device: torch.device | str = "cpu") -> str | None:
        """Why it can't run here, in one line; None where it can.

        Args:
            asked: the user named it, so that only what makes it impossible is a reason, not what makes it slow.
        """
        on_cpu = torch.device(device).type == "cpu"
        if self.packages and not on_cpu:
            return f"{self.name}: runs on the CPU only: --device cpu measures it"
        if command := pip_install(self.packages):
            return f"{self.name}: {command}"
        if self.dtype == torch.bfloat16 and not asked and not (cpu_has_native_bf16() if on_cpu else has_bf16(torch.device(device))):
            return f"{self.name}: this {'processor' if on_cpu else 'GPU'} has no bf16 instructions: it would be emulated, slower than fp32"
        return None

    def describe(self) -> str:
        """One line for tables, where nothing is missing: its name, version, precision and threads."""
        precision = PRECISION[self.dtype]
        release = import_extra(self.packages[-1] if self.packages else "torch").__version__.partition("-")[0]
        return f"{self.name.removesuffix(f' {precision}')} {release}, {precision}, {torch.get_num_threads()} threads"

    def prepare(self, network: nn.Module, images: Tensor) -> Run:
        """A callable that runs this batch; it ran once.

        Args:
            network: for inference: fused, in eval mode; its weights are laid out channels-last here.
            images: (B, 3, H, W) float32, 0..1; the shape is compiled in.

        Raises:
            UserError: this network does not run in it, and why.
        """
        if reason := self.missing(asked=True, device=images.device):
            raise UserError(reason)
        try:
            network = network.to(images.device, memory_format=torch.channels_last)
            run = self.make(network, images)
            run()
        except Exception as error:  # of a converter or a kernel: of any kind
            raise UserError(f"{self.name}: this network does not run in it: {short_reason(error, _LONGEST_REASON)}") from error
        return run


def choose_runtimes(asked: Sequence[str] = (), device: torch.device | str = "cpu") -> tuple[list[Runtime], list[str]]:
    """Those that can run on this device, and for each other one a line that says why not.

    Args:
        asked: names, of which only letters and digits count; none: all.

    Raises:
        UserError: no such runtime.
    """
    known = {_key(runtime.name): runtime for runtime in RUNTIMES}
    for name in asked:
        if _key(name) not in known:
            raise UserError(f"{name}: no such runtime{did_you_mean(_key(name), known)}; there are {', '.join(known)}")
    chosen = [known[_key(name)] for name in dict.fromkeys(asked)] or list(RUNTIMES)
    reasons = {runtime.name: runtime.missing(bool(asked), device) for runtime in chosen}
    return [runtime for runtime in chosen if not reasons[runtime.name]], [reason for reason in reasons.values() if reason]


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def pytorch_run(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    """Eager PyTorch, images channels-last; it did not run yet."""
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> Sequence[Tensor]:
        with autocast(images.device, dtype):
            maps = network(images)
        _synchronize(images)
        return maps

    return run


def _torchscript(network: nn.Module, images: Tensor) -> Run:
    images = images.contiguous(memory_format=torch.channels_last)
    with quiet():
        frozen = torch.jit.freeze(trace(network, images))

    @torch.inference_mode()
    def run() -> Sequence[Tensor]:
        maps = frozen(images)
        _synchronize(images)
        return maps

    return run


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _onnxruntime(network: nn.Module, images: Tensor) -> Run:
    onnxruntime = import_extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors, which also raise
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its idle threads slow whatever is timed next
    images = images.contiguous()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        to_onnx(network, images, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: [torch.from_numpy(maps) for maps in session.run(None, feed)]


def _openvino(network: nn.Module, images: Tensor) -> Run:
    openvino = import_extra("openvino")
    images = images.contiguous()
    converted = to_openvino(network, images)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32",
                "ENABLE_CPU_PINNING": False}  # as the others run; pinned, it waits for whatever else is on its core
    with keep_signal_stack():
        compiled = openvino.compile_model(converted, "CPU", settings)
    request, levels, array = compiled.create_infer_request(), range(len(compiled.outputs)), images.numpy()

    def run() -> Sequence[Tensor]:
        maps = request.infer([array], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(maps[i]) for i in levels]

    return run


RUNTIMES = (
    Runtime("PyTorch fp32", functools.partial(pytorch_run, dtype=torch.float32)),
    Runtime("PyTorch bf16", functools.partial(pytorch_run, dtype=torch.bfloat16), dtype=torch.bfloat16),
    Runtime("TorchScript", _torchscript),
    Runtime("ONNX Runtime", _onnxruntime, ("onnx", "onnxruntime")),
    Runtime("OpenVINO", _openvino, ("openvino",)),
)
