"""Shared fixtures. Real data lies beside the project; a test that needs it skips where it is missing."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import lively, tiny_model, train_flags

from models.yolo import DetectionModel
from utils.extras import forbid_telemetry

forbid_telemetry()  # tests import the packages themselves, too
# The tests' networks are so small that threads wait for each other longer than they compute, and sums must not depend on how many share them.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # likewise in exported files' runtimes and in the scripts that tests start
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs, labels, weights and videos."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing: real data and weights lie there")
    return SHARED


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder for all tests of a file."""
    return tmp_path_factory.mktemp(request.module.__name__)


@pytest.fixture(scope="module")
def tiny(place: Path) -> DetectionModel:
    """A network with boxes of every confidence, ready to be exported."""
    return lively(tiny_model(place))


@pytest.fixture(scope="module")
def flags(place: Path) -> list[str]:
    """Of a training that takes a fraction of a second an epoch, on a data set in `place`."""
    return train_flags(place)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Whatever a test sets."""
    yield
    torch.set_num_threads(1)
