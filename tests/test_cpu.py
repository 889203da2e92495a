"""What is said of the processor, by files made up for it and beside PyTorch."""
from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import cpu
from utils.errors import UserError


@pytest.mark.parametrize(("value", "threads"), [("3", 3), (" 5,2", 5), ("0", None), ("", None), ("many", None)])
def test_threads_as_openmp_is_told(value: str, threads: int | None, monkeypatch):
    monkeypatch.setattr(cpu, "_core", str)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cpu.cpu_threads() == (threads or 4)


def test_one_thread_for_each_core_that_may_be_used(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4}, raising=False)
    monkeypatch.setattr(cpu, "_core", lambda number: {0: "0,4", 4: "0,4", 1: "1,5"}[number])
    assert cpu.cpu_threads() == 2


def test_as_many_threads_as_pytorch():
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    code = "import torch; from utils.cpu import cpu_threads; print(cpu_threads(), torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(cpu.__file__).parents[1], env=environment, capture_output=True, text=True)
    ours, theirs = done.stdout.split()
    assert ours == theirs, done.stderr


@pytest.mark.parametrize(("native", "name", "expected"), [
    (True, "auto", "bf16"), (False, "auto", "fp32"), (True, "fp32", "fp32"), (True, "bf16", "bf16"), (False, "bf16", "bf16")])  # fmt: skip
def test_precision(native: bool, name: str, expected: str, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "_cpu_flags", lambda: {"avx512_bf16"} if native else {"avx2"})
    assert cpu.cpu_precision(name) == expected
    assert ("emulated" in capsys.readouterr().err) == (name == "bf16" and not native)
    monkeypatch.setattr(cpu, "_cpu_flags", set)  # a system that does not tell
    assert cpu.cpu_precision(name) == ("bf16" if name == "bf16" else "fp32") and not capsys.readouterr().err


@pytest.mark.parametrize(("limit", "used", "cached", "free"), [
    ("max", 5, 0, 2**60), (2**30, 2**29, 2**20, 2**29 + 2**20), (2**62, 5, 0, 2**60), (2**30, 2**31, 0, 1)])  # fmt: skip
def test_a_containers_limit(limit, used: int, cached: int, free: int, tmp_path: Path, monkeypatch):
    for name, content in (("memory.max", limit), ("memory.current", used), ("memory.stat", f"anon 1\ninactive_file {cached}")):
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(cpu, "_CGROUP", tmp_path)
    monkeypatch.setattr("builtins.open", lambda *_: io.StringIO(f"MemTotal: 9 kB\nMemAvailable: {2**50} kB\n"))
    assert cpu.free_memory_bytes() == free


def test_no_fp16():
    with pytest.raises(UserError, match="needs a CUDA device"):
        cpu.cpu_precision("fp16")


@pytest.mark.parametrize(("threads", "images"), [(1, 1), (2, 2), (64, 4)])
def test_images_at_once(threads: int, images: int):
    assert cpu.images_at_once(threads) == images
