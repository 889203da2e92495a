"""Shared fixtures. Real data lies beside the project; a test that needs it skips where it is missing."""
from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs, labels, weights and videos."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing: real data and weights lie there")
    return SHARED
