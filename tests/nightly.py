"""`make nightly`: all that is slow, part after part; ends with the code of the first that failed.

python -m tests.nightly [--list] [part ...]

A part that fails or overruns does not keep the next ones from running.  What make test and make
test-ci select, and the parts here, is every test once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORACLES = ROOT / ".venv-oracles"
MAY_SKIP = "gpu,root,browser"
"""Marks of the tests that may be skipped: what one machine in the project's hands cannot be."""
LIMIT_MINUTES = 180
GRACE_SECONDS = 15
TIMED_OUT, INTERRUPTED = 124, 130


def tests(selection: str, python: str | Path = sys.executable) -> tuple[str, ...]:
    """The command that runs the tests of a mark expression and takes no excuse."""
    return (str(python), "-m", "pytest", "-q", "--durations=10", "--continue-on-collection-errors",
            "--no-skips-but", MAY_SKIP, "-m", selection)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Commands one after the other; stopped where they take longer than `minutes`."""

    what: str
    minutes: int
    commands: tuple[tuple[str, ...], ...]


PARTS = {
    "slow": Part("tests marked slow: every layout, drawn configurations, compiled kernels", 75,
                 (tests("slow and not gpu and not cluster and not oracles and not browser"),)),
    "faults": Part("500 kills, 300 bit flips, and the tests of every fault", 35,
                   ((sys.executable, "-m", "tests.faults", "--kills", "500", "--flips", "300",
                     "--no-skips-but", MAY_SKIP),)),
    "parity": Part("every layout of docs/parity.md against the serial run", 35,
                   ((sys.executable, "-m", "tests.parity", "--all"),)),
    "oracles": Part("tests that stand beside other libraries, in .venv-oracles, and in a browser", 20,
                    (("tools/setup.sh", "oracles"),
                     tests("slow and browser and not gpu and not cluster and not oracles"),
                     tests("oracles and not gpu and not cluster", ORACLES / "bin/python"))),
    "cluster": Part("hosts as network namespaces; needs root", 10,
                    (tests("cluster and not gpu"),)),
    "gpu": Part("what needs GPUs", 5, (tests("gpu"),)),
}  # fmt: skip
"""Name -> part, in the order in which they run."""


@dataclass(frozen=True)
class Result:
    """How a part ended, and how long it took."""

    code: int
    seconds: float

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return {0: "ok", TIMED_OUT: "TIMED OUT"}.get(self.code, f"FAILED ({self.code})")


def call(command: Sequence[str], seconds: float) -> int:
    """Its exit code; whatever happens, nothing that it started is left running."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
        finally:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)  # tests put away what they made
                    process.wait(GRACE_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def run(part: Part) -> Result:
    """Its commands up to the first that fails."""
    began, code = time.monotonic(), 0
    for command in part.commands:
        code = call(command, began + 60 * part.minutes - time.monotonic())
        if code:
            break
    return Result(code, time.monotonic() - began)


def say(*lines: str) -> None:
    print(*(f"nightly: {line}" for line in lines), sep="\n", flush=True)


def clock(seconds: float) -> str:
    """As 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def summary(asked: Sequence[str], results: dict[str, Result]) -> list[str]:
    """A line for each part, the sum, and how to run again what did not pass."""
    lines = []
    for name in asked:
        result = results.get(name)
        words = (result.verdict, clock(result.seconds)) if result else ("not run", "")
        lines.append(f"{name:8} {words[0]:13} {words[1]:>8}  {PARTS[name].what}")
    lines.append(f"{'':22} {clock(sum(result.seconds for result in results.values())):>8}")
    again = [name for name in asked if name not in results or results[name].code]
    lines.append(f'again: make nightly PARTS="{" ".join(again)}"' if again else "all parts passed")
    return lines


def run_all(asked: Sequence[str]) -> int:
    """All parts asked for; the code of the first that failed."""
    results: dict[str, Result] = {}
    try:
        for number, name in enumerate(asked, 1):
            part = PARTS[name]
            say(f"{number}/{len(asked)} {name}: {part.what}; at most {part.minutes} minutes")
            results[name] = run(part)
            say(f"{name} {results[name].verdict} after {clock(results[name].seconds)}")
    except KeyboardInterrupt:
        say("interrupted", *summary(asked, results))
        return INTERRUPTED
    say(*summary(asked, results))
    return next((result.code for result in results.values() if result.code), 0)


def main() -> int:
    """Run the parts that are named, or all."""
    parser = ArgumentParser(prog="python -m tests.nightly", description=__doc__,
                            formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="say what each part holds")
    asked = parser.parse_args()
    unknown = [name for name in asked.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if asked.list:
        for name, part in PARTS.items():
            print(f"{name:8} at most {part.minutes:3} minutes  {part.what}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_all(list(dict.fromkeys(asked.parts)) or list(PARTS))


if __name__ == "__main__":
    sys.exit(main())
