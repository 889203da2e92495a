"""Shared fixtures. Real data lies beside the project; a test that needs it skips where it is missing."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from utils.extras import forbid_telemetry

forbid_telemetry()  # tests import the packages themselves, too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as below, in exported files' runtimes and in the scripts that tests start
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs, labels, weights and videos."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing: real data and weights lie there")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_threads() -> None:
    """The tests' networks are so small that threads wait for each other longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums must not depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
