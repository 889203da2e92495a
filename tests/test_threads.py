"""How OpenMP's idle threads are told to wait, and by whom."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from utils.extras import import_extra
from utils.threads import wait_politely

POLICY = "OMP_WAIT_POLICY"


def test_wait_politely_leaves_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POLICY, "active")
    wait_politely()
    assert os.environ[POLICY] == "active"
    monkeypatch.delenv(POLICY)
    wait_politely()
    assert os.environ[POLICY] == "passive"


@pytest.mark.parametrize(("before", "within"), [(None, "passive"), ("active", "active")])
def test_extras_wait_politely_and_the_program_as_it_did(before: str | None, within: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP reads it while it is loaded."""
    (tmp_path / "some_extra.py").write_text(f"import os\npolicy = os.environ['{POLICY}']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_extra", raising=False)
    monkeypatch.delenv(POLICY, raising=False)
    if before:
        monkeypatch.setenv(POLICY, before)
    assert import_extra("some_extra").policy == within and os.environ.get(POLICY) == before
