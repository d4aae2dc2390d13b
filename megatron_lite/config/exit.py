"""How a program ends: one FATAL line on stderr and the exit code of the failure's class."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_lite.config.errors import ConfigError, ExtensionError, MegatronLiteError
from megatron_lite.config.extensions import in_extension, whose_bug
from megatron_lite.config.streams import ReaderGone, outlive_output, settle_output

BUG = 70
INTERRUPTED = 130


class ToolParser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors, so that every failure of a tool ends the same way.

    Abbreviated flags are refused: `--work` must not silently mean `--workers`.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.register("type", int, _whole)
        self.add_argument("--debug", action="store_true", help="a traceback for every failure")

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError where argparse would print its usage and exit."""
        raise ConfigError(f"{message} - see {self.prog} --help")


def _whole(text: str) -> int:
    """What a tool's `type=int` takes: no number that arrays and generators do not."""
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:40]} is beyond 2^63 - 1")
    return number


def fatal_line(error: BaseException, *, rank: int | None = None, step: int | None = None) -> str:
    """`FATAL[<code>] rank=<r> step=<n>: <what>`; a message of several lines keeps them."""
    code = error.exit_code if isinstance(error, MegatronLiteError) else BUG
    what = (
        str(error) if isinstance(error, MegatronLiteError) else f"{type(error).__name__}: {error}"
    )
    where = f"rank={'-' if rank is None else rank} step={'-' if step is None else step}"
    return f"FATAL[{code}] {where}: {what}"


def asks_for_text(words: Sequence[str]) -> bool:
    """Whether nothing is asked for but what is printed: a reader that has seen enough ends the program."""
    return not {"-h", "--help", "--dry-run"}.isdisjoint(words)


def run_tool(
    main: Callable[[], int],
    *,
    argv: Sequence[str] | None = None,
    results: bool = False,
    go_on: str = "",
) -> int:
    """Run a tool's main and return its exit code; a failure becomes one FATAL line on stderr.

    A foreseeable failure (MegatronLiteError) ends with the code of its class and no traceback
    unless `--debug` is among the arguments; anything else is our bug: code 70 with one.
    results: the tool is for what it prints; where it writes files, a stdout that takes nothing is
    a warning.  go_on: what to do after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    outlive_output(results=results or asks_for_text(words))
    debug = "--debug" in words
    code = _run(main, debug=debug, go_on=go_on)
    settle_output()
    return code


def _run(main: Callable[[], int], *, debug: bool, go_on: str) -> int:
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        way = f" - {go_on}" if go_on else ""
        print(f"FATAL[{INTERRUPTED}] rank=- step=-: stopped by Ctrl-C{way}", file=sys.stderr)
        return INTERRUPTED
    except ReaderGone as gone:
        return gone.exit_code
    except Exception as error:
        return failed(error, debug=debug)


def failed(error: Exception, *, debug: bool) -> int:
    """Say why nothing more is done; the exit code.  What nobody foresaw is shown with its traceback."""
    known = in_extension(error)
    foreseen = isinstance(known, MegatronLiteError)
    line = fatal_line(known)
    print(line if foreseen else f"{line} - {whose_bug()}", file=sys.stderr, flush=True)
    if debug or not foreseen or isinstance(known, ExtensionError):
        traceback.print_exception(known)
    return known.exit_code if isinstance(known, MegatronLiteError) else BUG
