"""The fault suite as a program: `make faults`; one table, exit 1 if any row is not as it must be.

python -m tests.faults [--kills 200] [--flips 100] [--seed 1] [--only S1 L20 ...] [--list]
                       [--no-skips-but gpu,root]

Two lanes work side by side, each on a campaign or on the tests of one file, in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.table import ROWS, Row
from tests.support.places import ROOT

JOB_SECONDS = 540
QUICK = ("L2", "L20", "L18")
"""Campaigns of thousands of saves in which nothing is killed: they need not reach the device."""


@dataclass
class Result:
    """What came of a row."""

    seconds: float = 0.0
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    text: str = ""

    @property
    def verdict(self) -> str:
        """ok, FAILED, or why it could not be tried."""
        if self.failed or not (self.passed or self.skipped):
            return "FAILED"
        return "ok" if self.passed else "skipped"


def count_for(row: Row, asked: argparse.Namespace) -> int:
    """How many kills or flips of the campaign."""
    flipping = row.id.startswith("L2.")
    return max(1, round((asked.flips if flipping else asked.kills) * row.share))


def main() -> int:
    """Run every row, print the table."""
    asked = _parse()
    rows = [row for row in ROWS if not asked.only or row.id in asked.only]
    if asked.campaign:
        return _campaign(rows[0], asked)
    if asked.list:
        for row in rows:
            print(f"{row.id:6} {row.fault:34} {row.outcome}")
        return 0
    began = time.monotonic()
    print(
        f"seed {asked.seed}, {asked.kills} kills, {asked.flips} flips of each kind of file",
        flush=True,
    )
    results = {row.id: Result() for row in rows}
    jobs: queue.SimpleQueue[tuple[list[Row], list[str]]] = queue.SimpleQueue()
    for job in _jobs(rows, asked):
        jobs.put(job)
    lanes = [
        threading.Thread(target=_lane, args=(jobs, results, began)) for _ in range(asked.lanes)
    ]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    _print_table(rows, results)
    bad = [row.id for row in rows if results[row.id].verdict == "FAILED"]
    kills = sum(count_for(r, asked) for r in rows if r.code == "-9" and r.campaign)
    print(f"{len(rows)} rows, {kills} kills, {time.monotonic() - began:.0f} s: "
          f"{'all as they must be' if not bad else 'NOT as it must be: ' + ', '.join(bad)}")  # fmt: skip
    return 1 if bad else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="ID")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--no-skips-but", metavar="MARKS", help="of the tests, as for pytest")
    parser.add_argument("--campaign", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _jobs(rows: list[Row], asked: argparse.Namespace) -> list[tuple[list[Row], list[str]]]:
    """Each campaign by itself, the longest first; then the tests, a process per file."""
    common = ["--kills", str(asked.kills), "--flips", str(asked.flips), "--seed", str(asked.seed)]
    campaigns = [row for row in rows if row.campaign]
    campaigns.sort(key=lambda row: (row.code != "-9", -count_for(row, asked)))
    jobs = [
        ([row], [sys.executable, "-m", "tests.faults", "--campaign", "--only", row.id, *common])
        for row in campaigns
    ]
    by_file: dict[str, list[Row]] = {}
    for row in rows:
        for test in row.tests:
            held = by_file.setdefault(test.partition("::")[0], [])
            if row not in held:
                held.append(row)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"]
    if asked.no_skips_but:
        pytest += ["--no-skips-but", asked.no_skips_but]
    jobs += [(held, [*pytest, file]) for file, held in by_file.items()]
    return jobs


def _lane(
    jobs: queue.SimpleQueue[tuple[list[Row], list[str]]], results: dict[str, Result], began: float
) -> None:
    while True:
        try:
            rows, command = jobs.get_nowait()
        except queue.Empty:
            return
        with contextlib.suppress(Exception):  # a row without a result is a failed one
            if "pytest" in command:
                _run_tests(rows, command, results)
            else:
                _run_campaign(rows[0], command, results[rows[0].id])
        done = ", ".join(f"{r.id} {results[r.id].verdict}" for r in rows)
        print(f"[{time.monotonic() - began:4.0f} s] {done}", flush=True)


def _process(command: list[str]) -> tuple[int, str]:
    """Exit code and output; past the deadline the whole process group is killed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True, env=env)  # fmt: skip
    try:
        out, _ = process.communicate(timeout=JOB_SECONDS)
    except subprocess.TimeoutExpired:
        out = f"did not end within {JOB_SECONDS} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, out


def _run_tests(rows: list[Row], command: list[str], results: dict[str, Result]) -> None:
    file = command[-1]
    wanted = [test for row in rows for test in row.tests if test.startswith(file)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        selection = [] if file in wanted else ["-k", _expression(wanted)]
        _, out = _process([*command[:-1], f"--junitxml={report}", *selection, file])
        cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else ()
        for case in cases:
            name = f"{file}::{case.get('name')}"
            for row in rows:
                if any(name.startswith(test) for test in row.tests):
                    _count(results[row.id], case, name)
    for row in rows:
        if not results[row.id].passed and not results[row.id].skipped:
            results[row.id].failed.append(out[-600:])


def _expression(tests: list[str]) -> str:
    functions = {re.split(r"[\[]", test.partition("::")[2])[0] for test in tests}
    return " or ".join(sorted(functions))


def _count(result: Result, case: ElementTree.Element, name: str) -> None:
    result.seconds += float(case.get("time", 0))
    wrong = case.find("failure")
    wrong = case.find("error") if wrong is None else wrong
    skipped = case.find("skipped")
    if wrong is not None:
        result.failed.append(f"{name}: {(wrong.get('message') or '')[:300]}")
    elif skipped is not None:
        result.skipped.append(skipped.get("message") or "")
    else:
        result.passed += 1


def _run_campaign(row: Row, command: list[str], result: Result) -> None:
    began = time.monotonic()
    _, out = _process(command)
    result.seconds = time.monotonic() - began
    found = re.findall(r"^RESULT (.*)$", out, re.MULTILINE)
    if not found:
        result.failed.append(out[-900:])
        return
    counted = json.loads(found[-1])
    result.text = counted["text"]
    result.failed += counted["wrong"]
    result.passed = counted["kills"]


def _campaign(row: Row, asked: argparse.Namespace) -> int:
    """In a process of its own: one campaign, its result as the last line."""
    from tests.faults import damage, kills

    logging.disable(logging.WARNING)
    if row.id.split(".")[0] in QUICK:
        os.fsync = lambda descriptor: None  # type: ignore[assignment,misc]
    campaign = (kills.CAMPAIGNS | damage.CAMPAIGNS)[row.campaign]
    # a kill leaves what the kernel holds, so memory serves as a disk; power cuts have rows of their own
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory if roomy else None) as folder:
        counted = campaign(
            count_for(row, asked), asked.seed, Path(folder),
            lambda line: print(f"{row.id}: {line}", flush=True),
        )  # fmt: skip
    answer = {"kills": counted.kills, "text": counted.text, "wrong": counted.wrong}
    print("RESULT " + json.dumps(answer), flush=True)
    return 1 if counted.wrong else 0


def _print_table(rows: list[Row], results: dict[str, Result]) -> None:
    head = ("id", "fault", "what happened", "exit code", "s", "lost", "")
    lines = [head]
    for row in rows:
        result = results[row.id]
        tried = f"{result.passed}x " if result.passed else ""
        lines.append((row.id, row.fault, tried + row.outcome, row.code, f"{result.seconds:.1f}",
                      row.lost, result.verdict))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    print()
    for line in lines:
        print(
            "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        )
    print()
    for row in rows:
        result = results[row.id]
        if result.text:
            print(f"{row.id}: {result.text}")
        for reason in sorted(set(result.skipped)):
            print(f"{row.id} skipped: {reason}")
        for problem in result.failed:
            print(f"{row.id} FAILED: {problem}")


if __name__ == "__main__":
    sys.exit(main())
