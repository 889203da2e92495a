"""Optional packages: imported by those who need them when they need them, and silent towards their makers."""
from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from types import ModuleType

from utils.errors import UserError, short_reason
from utils.threads import waiting_politely


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def pip_install(packages: Iterable[str]) -> str | None:
    """The command that brings those that are missing; None where all are there."""
    missing = [package for package in packages if not is_installed(package)]
    return f"pip install {' '.join(missing)}" if missing else None


def forbid_telemetry() -> None:
    """ONNX Runtime and OpenVINO would report their use over the network: tell them not to, before they are imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # OpenVINO goes without where it can't be imported


def import_extra(package: str) -> ModuleType:
    """An optional package, which reports its use to nobody, and whose idle threads sleep; it must not be imported in any other way.

    Raises:
        UserError: it is not installed.
    """
    forbid_telemetry()
    try:
        with waiting_politely():
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(f"needs {package}: pip install {package}") from None
    except ImportError as error:
        raise UserError(f"{package}: is installed and can't be loaded: {short_reason(error)}") from None
