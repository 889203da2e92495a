"""Training, compression and detection on a device that is not the CPU: no tensor of one device meets one of the other."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

SHADOW = Path(__file__).with_name("shadow.py")
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this PyTorch has no devices in Python")


def test_scripts_on_another_device() -> None:
    run = subprocess.run([sys.executable, SHADOW], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-5000:]


def test_the_device_refuses_what_cuda_refuses() -> None:
    code = """
import shadow, torch
shadow.register()
a = torch.ones(3, device="shadow")
assert (a * 2).sum().item() == 6 and (a + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2] and a[torch.tensor([0])].cpu().tolist() == [1]
for wrong in (lambda: a + torch.ones(3), lambda: torch.ones(3)[a.long()], lambda: a.numpy(), lambda: torch.cat([a, torch.ones(3)])):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("not refused")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=SHADOW.parent, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
