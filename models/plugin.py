"""--plugin: a user's own Python file, imported by name so that its blocks register themselves."""
from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

from utils.errors import UserError

_PREFIX = "plugin_"  # of the names that plugins get as modules


def load_plugin(path: str) -> None:
    """Import the file that the user named; nothing for an empty path. It is code: name only files you trust.

    Raises:
        UserError: no such file, or it fails as it is imported (its line is named).
    """
    if not path:
        return
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"--plugin {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"{_PREFIX}{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        line = plugin_line(error)
        raise UserError(f"--plugin {path}{f':{line}' if line else ''}: {type(error).__name__}: {error}") from error


def plugin_line(error: BaseException) -> int | None:
    """The deepest line of a plugin that an error came through; None if it came through none."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if str(frame.f_globals.get("__name__")).startswith(_PREFIX)]
    return lines[-1] if lines else None
