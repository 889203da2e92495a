"""--plugin: a user's own Python file, imported by name so that its blocks register themselves."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from utils.errors import UserError


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
    spec = importlib.util.spec_from_file_location(f"plugin_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        line = f":{trace.tb_lineno}" if trace and trace.tb_frame.f_code.co_filename == str(file) else ""
        raise UserError(f"--plugin {path}{line}: {type(error).__name__}: {error}") from None
