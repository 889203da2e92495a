"""What the processor can do, and its memory set up to be fast: no torch, which exported files do without."""
from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Literal, get_args

from utils.errors import UserError
from utils.log import warn

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # glibc, malloc.h
_CGROUP = Path("/sys/fs/cgroup")
_MOST_AT_ONCE = 4  # each image under way holds its own activations


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
    if not flags:
        return "int8 instructions that this system does not tell of"
    found = [name for flag, name in _INT8.items() if flag in flags]
    return " and ".join(found) if found else "no int8 instructions (VNNI, AMX), so that int8 gains less here than where they are"


def check_precision(name: str) -> None:
    """Raises UserError where there is no such precision: from Python it may be any text."""
    if name not in get_args(PrecisionName):
        raise UserError(f"precision {name!r}: one of {', '.join(get_args(PrecisionName))}")


def cpu_precision(name: PrecisionName) -> Literal["fp32", "bf16"]:
    """What convolutions and matrix products run in on this processor; auto: bf16 where it has it natively, else fp32.

    Raises:
        UserError: fp16 is asked for, or there is no such precision.
    """
    check_precision(name)
    if name == "fp16":
        raise UserError("--precision fp16 (--half) needs a CUDA device: on a CPU use auto, bf16 or fp32")
    if name == "auto":
        return "bf16" if cpu_has_native_bf16() else "fp32"
    if name == "bf16" and _cpu_flags() and not cpu_has_native_bf16():
        warn("this processor has no bf16 instructions: --precision bf16 is emulated, slower than fp32")
    return name


def cpu_threads() -> int:
    """Threads to compute with, as PyTorch counts them: OMP_NUM_THREADS, else one for each core that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len({_core(number) for number in processors()})


def processors() -> set[int]:
    """The logical processors that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _core(number: int) -> str:
    """The logical processors that share a core with this one; itself alone where the system does not tell."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(number)


def images_at_once(threads: int) -> int:
    """Images to run side by side, each on a thread or more of its own: so they finish sooner than one after the other (docs/results.md)."""
    return min(threads, _MOST_AT_ONCE)


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


def free_memory_bytes() -> int:
    """What the system, and a container's limit, can give without swapping; 0 where it does not tell."""
    try:
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    try:  # a control group of version 2: what its files in the page cache take, it can give back
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = next(int(line.split()[1]) for line in (_CGROUP / "memory.stat").read_text().splitlines() if line.startswith("inactive_file "))
    except (OSError, ValueError, StopIteration):  # none, or no limit ("max")
        return available
    return max(min(available, limit - used + cached), 1)
