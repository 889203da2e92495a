"""Which device, which precision, and a CPU set up to be fast."""
from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from utils.errors import UserError
from utils.log import warn

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # glibc, malloc.h


def select_device(name: str = "") -> torch.device:
    """Of "" the first CUDA device, else the CPU; "cpu", "0", "cuda:1" as named. Under torchrun each process takes its own.

    Raises:
        UserError: CUDA is asked for and absent, or no such device.
    """
    asked = str(name).strip().lower()
    if asked == "cpu" or (asked == "" and not torch.cuda.is_available()):
        return torch.device("cpu")
    name = asked.removeprefix("cuda:").removeprefix("cuda")
    if not torch.cuda.is_available():
        raise UserError(f"--device {asked}: PyTorch {torch.__version__} sees no CUDA device here: use --device cpu")
    if "," in name:
        raise UserError(f"--device {name}: for several GPUs use torchrun --nproc_per_node {name.count(',') + 1} train.py …, with no --device")
    index = int(os.environ.get("LOCAL_RANK", "0")) if name == "" else int(name) if name.isdecimal() else -1
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise UserError(f"--device {name or index}: there are {count} CUDA devices, 0 to {count - 1}; or use cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _cpu_flags() -> set[str]:
    """What the processor says that it can do; nothing where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as file:
            return set(next((line for line in file if line.startswith(("flags", "Features"))), "").split())
    except OSError:
        return set()


def cpu_has_native_bf16() -> bool:
    """True where the processor multiplies bf16 itself (AVX512_BF16 or AMX): elsewhere bf16 is emulated, and slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags())


# What adds products of 8 bits in 32 at once, the fastest first; without it int8 takes three instructions for one, and gains less.
_INT8 = {"amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "i8mm": "I8MM", "asimddp": "dot products"}


def cpu_int8() -> str:
    """The processor's instructions for int8 in words."""
    flags = _cpu_flags()
    found = [name for flag, name in _INT8.items() if flag in flags]
    return " and ".join(found) if found else "no int8 instructions (VNNI, AMX), so that int8 gains less here than where they are"


def compute_dtype(precision: PrecisionName, device: torch.device) -> torch.dtype:
    """The type that convolutions and matrix products run in.

    auto: bf16 on CUDA devices and CPUs that have it natively, fp16 on older CUDA devices, else fp32.
    """
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if cpu_has_native_bf16() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 (--half) needs a CUDA device: on a CPU use auto, bf16 or fp32")
    if precision == "bf16" and device.type == "cpu" and not cpu_has_native_bf16():
        warn("this processor has no bf16 instructions: --precision bf16 is emulated, slower than fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; nothing at all for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def keep_freed_memory() -> None:
    """Have glibc's allocator keep freed blocks: otherwise each layer's output goes back to the kernel, and page faults dominate on a CPU."""
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        # The largest values that mallopt's int takes; a threshold above every tensor's size. One arena, so that a thread's freed blocks serve all.
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20)):
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        return  # another libc (musl): nothing to set


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return "CPU"


PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def machine(device: torch.device) -> str:
    """The device, and a CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """One line for logs and tables: the device, its threads and the precision."""
    return f"{machine(device)}, {PRECISION[dtype]}, torch {torch.__version__}"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on a CUDA device, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where no figure is given

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory_bytes() -> int:
    """What the system can give without swapping; 0 where it does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
