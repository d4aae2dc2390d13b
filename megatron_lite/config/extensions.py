"""--extend: Python files of a user, run before the flags are read, that add rows to the tables."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from megatron_lite.config.errors import ConfigError, ExtensionError, MegatronLiteError

_PREFIX = "megatron_lite_extension:"
"""In front of a file's path: its name among the modules of this process."""


def extend(paths: Iterable[str]) -> None:
    """Run each file, once per process.

    Raises ConfigError for one that is not there or fails.  They are programs of whoever typed the
    command line: neither a file nor a checkpoint can name one.
    """
    for path in paths:
        file = Path(path).resolve()
        name = f"{_PREFIX}{file}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise ConfigError(f"--extend {path}: is no Python file (name it with its .py)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever it is, it is the file's
            del sys.modules[name]
            raise ConfigError(f"--extend {path}: {_where(error, file)}") from error


def add_extend_flag(parser: argparse._ActionsContainer) -> None:
    """--extend of a tool with a parser of its own, as `extend`: a list of files for extend()."""
    parser.add_argument(
        "--extend", action="append", default=[], metavar="FILE",
        help="Python file that adds rows to tables, run first",
    )  # fmt: skip


def extensions() -> list[str]:
    """The files that were run here: what a process started by this one must run, too."""
    return [name.removeprefix(_PREFIX) for name in sys.modules if name.startswith(_PREFIX)]


def in_extension(error: BaseException) -> BaseException:
    """The error in the words of the file it came from, where a line of one of them was being run."""
    if isinstance(error, Exception) and not isinstance(error, MegatronLiteError):
        for file in extensions():
            if _lines(error, Path(file)):
                said = ExtensionError(f"--extend {file}: {_where(error, Path(file))}")
                said.__cause__ = error
                return said
    return error


def whose_bug() -> str:
    """What to say of an error that nothing foresaw."""
    files = ", ".join(extensions())
    if not files:
        return "a bug of ours - please report it with the traceback that follows"
    return f"a bug of ours, or of a row that {files} (--extend) added: the traceback that follows says which"


def _lines(error: BaseException, file: Path) -> list[int]:
    """Those of the file that were being run, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.lineno or 0 for frame in frames if frame.filename == str(file)]


def _where(error: BaseException, file: Path) -> str:
    """`line 3: KeyError: 'adamm'`: the last line of the file that was being run."""
    own = _lines(error, file)
    line = own[-1] if own else getattr(error, "lineno", None)
    return f"line {line}: {type(error).__name__}: {error}"
