"""A user's mistake: one line on stderr and exit code 2, never a traceback."""
from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from utils.signals import term_as_interrupt

USER_ERROR = 2
_DISK_ERRORS = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.EFBIG, errno.EISDIR,
                errno.ENAMETOOLONG}
_REQUIRED = {"torch", "torchvision", "numpy", "cv2", "PIL", "yaml", "tqdm", "matplotlib", "pycocotools", "thop", "distutils"}  # as they are imported
_NO_LIBRARY = re.compile(r"\.so[.\d]*: |DLL load failed|Library not loaded")
_LIMITS = {errno.EAGAIN, errno.EMFILE, errno.ENFILE}
_TOO_MANY = "too many processes, threads or open files for this machine's limits: lower --workers, or raise them (ulimit -u, ulimit -n)"
_SHORT_OF_MEMORY = "out of memory: lower --imgsz, or --batch-size and --workers where they are"
_LONGEST = 2000  # characters of a message


class UserError(Exception):
    """Something the user can mend. The message is one line that names the file, the place and the mend.

    What it quotes may come from a hostile file: no control characters reach the terminal, and its middle is cut where it is endless.
    """

    def __reduce__(self) -> tuple[type[Exception], tuple[str]]:
        """On the way to another process, where torch.hub's copy of this class can't be found, the message alone."""
        kind = type(self)
        return (kind if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind else RuntimeError), (str(self),)

    def __str__(self) -> str:
        line = " ".join("".join(c if c.isprintable() else " " for c in super().__str__()).split())
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST * 3 // 4]} … {line[-_LONGEST // 4 :]}"


def error_lines(error: BaseException) -> list[str]:
    """What another's error says, line by line; its kind where it says nothing."""
    return str(error).strip().splitlines() or [type(error).__name__]


def first_line(error: BaseException) -> str:
    """Another's error in one line: its kind and the first line that it says."""
    kind, line = type(error).__name__, error_lines(error)[0]
    return line if line == kind else f"{kind}: {line}"


def short_reason(error: BaseException, longest: int = 300) -> str:
    """All that another's error says on one line of at most so many characters."""
    line = " ".join(" ".join(error_lines(error)).split())
    return line if len(line) <= longest else f"{line[: longest - 2]} …"


@contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Around others' code, which fails in any way: as `what: reason`. A full disk and a lack of memory are nothing that the code could help.

    Raises:
        UserError: it fails.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        raise UserError(f"{what}: {short_reason(error)}") from error


def script(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Make `main(argv)` return 2, with one line on stderr, for mistakes, missing packages, unwritable folders, memory and Ctrl-C."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # where the terminal has no such letter, a class may be called so all the same
        try:
            with term_as_interrupt():
                return main(argv)
        except UserError as error:
            line = str(error)
        except KeyboardInterrupt:
            line = ("interrupted: what was finished is whole on disk; train.py goes on with --resume (after its first epoch), compare.py with the "
                    "same command, prune.py with that, --exist-ok and its folder's --name")
        except BrokenPipeError:  # `… | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("", "models", "utils"):
                raise
            line = (f"needs {error.name}: pip install -r requirements.txt" if error.name in _REQUIRED else
                    f"needs the Python module {error.name}: install the package that has it")
        except ImportError as error:  # of a package that is there: a library of the system's is not
            if not _NO_LIBRARY.search(str(error)):
                raise
            mend = "pip install opencv-python-headless in place of opencv-python" if error.name == "cv2" else "install that library of the system's"
            line = f"{error.name or 'a package'} can't be loaded: {short_reason(error)}: {mend}"
        except OSError as error:
            if error.errno in _LIMITS:
                line = _TOO_MANY
            elif _is_out_of_memory(error):
                line = _SHORT_OF_MEMORY
            elif error.errno not in _DISK_ERRORS:
                raise
            else:
                line = f"{error.filename or 'output'}: {error.strerror}: choose a folder with room that you may write to"
        except (MemoryError, RuntimeError) as error:
            if str(error).startswith("DataLoader worker"):
                line = (f"a process that loads images has ended ({short_reason(error, 100)}): if memory was short, lower --batch-size or --workers, "
                        "give --cache none, or (in Docker) more shared memory: --shm-size 8g")
            elif any(words in str(error).lower() for words in ("can't start new thread", "too many open files")):
                line = _TOO_MANY
            elif not _is_out_of_memory(error):
                raise
            else:
                line = _SHORT_OF_MEMORY
        print(f"error: {line}", file=sys.stderr)
        return USER_ERROR

    return guarded


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch reports both devices' shortage as a RuntimeError; only the CUDA one has a class of its own."""
    text = str(error).lower()
    short = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return short or any(words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed"))
