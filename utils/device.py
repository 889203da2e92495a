"""Which device PyTorch computes on, and in which precision."""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from utils.cpu import PrecisionName, check_precision, cpu_name, cpu_precision
from utils.errors import UserError

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPE = {name: dtype for dtype, name in PRECISION.items()}
_NO_TENSOR_CORES = re.compile(r"GTX 16|\bT\d{3,4}\b|\bMX[45]50\b")  # of the Turing family: their fp16 convolutions give NaN (pytorch issue 58123)


def select_device(name: str = "") -> torch.device:
    """Of "" the first CUDA device, else the CPU; "cpu", "0", "cuda:1" as named. Under torchrun each process takes its own.

    Raises:
        UserError: CUDA is asked for and absent, or no such device.
    """
    asked = str(name).strip().lower()
    if asked == "cpu" or (asked == "" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if asked == "mps":
        raise UserError("--device mps: Apple's GPUs are not supported: use --device cpu")
    name = asked.replace(" ", "").removeprefix("cuda:").removeprefix("cuda")
    if not torch.cuda.is_available():
        raise UserError(f"--device {asked}: PyTorch {torch.__version__} sees no CUDA device here: use --device cpu")
    rank, processes = (int(os.environ.get(key, default)) for key, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if name and processes > 1:
        names = name.split(",")
        if len(names) != processes:
            raise UserError(f"--device {name}: names {len(names)} for {processes} processes: one each, or leave it out")
        name = names[rank]
    if "," in name:
        several = f"torchrun --nproc_per_node {name.count(',') + 1} train.py …, with no --device"
        raise UserError(f"--device {name}: name one; train.py uses several: {several}")
    index = rank if name == "" else int(name) if name.isdecimal() else -1
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise UserError(f"--device {name or index}: there are {count} CUDA devices, 0 to {count - 1}; or use cpu")
    return torch.device("cuda", index)


def compute_dtype(precision: PrecisionName, device: torch.device) -> torch.dtype:
    """The type that convolutions and matrix products run in.

    auto: bf16 on CUDA devices and CPUs that have it natively, fp16 on older CUDA devices with tensor cores, else fp32.

    Raises:
        UserError: the device has no such precision.
    """
    check_precision(precision)
    if device.type == "cpu":
        return DTYPE[cpu_precision(precision)]
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float16 if _has_fp16(device) else torch.float32
    return DTYPE[precision]


def has_bf16(device: torch.device) -> bool:
    """A CUDA device computes in bf16 natively."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _has_fp16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 7 and not _NO_TENSOR_CORES.search(torch.cuda.get_device_name(device))


@contextmanager
def full_float32() -> Iterator[None]:
    """Without TensorFloat-32, PyTorch's default for convolutions on CUDA devices since Ampere, which keeps 10 bits of each factor."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; nothing at all for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def machine(device: torch.device) -> str:
    """The device, and a CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """One line for logs and tables: the device, its threads and the precision."""
    return f"{machine(device)}, {precision_name(device, dtype)}, torch {torch.__version__}"


def precision_name(device: torch.device, dtype: torch.dtype) -> str:
    """With what PyTorch makes of fp32 on CUDA devices since Ampere, outside `full_float32`."""
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device)[0] >= 8:
        return "fp32 (TF32 convolutions)"
    return PRECISION[dtype]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on a CUDA device, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
