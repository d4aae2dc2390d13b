"""`make bench AGAINST=<commit>`, `make bench-parallel AGAINST=<commit>`: this tree beside another commit.

Three sides stand ready at once, each in processes of its own: this tree, the commit, and the commit a
second time.  They train in turn, the order changing from round to round; a ratio is that of two sides'
times in one round, so that what else the machine does falls on all.  How far the commit is from itself
says what a ratio means here.  Nothing became slower where the median of the ratios is at least 0.98 and
not below the lower quartile of the commit against itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RANKS = {"train": 1, "parallel": 2}
LEAST = 0.98
"""Least median ratio of speeds."""


class Answer(NamedTuple):
    """Seconds per step: of the slowest process by the clock, of all by their processors; the loss."""

    wall: float
    cpu: float
    loss: float


class Side:
    """The processes of one tree, which train when asked."""

    def __init__(self, tree: Path, kind: str, errors: IO[bytes]) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        worker = str(Path(__file__).with_name("serve_steps.py"))
        self.processes = [
            subprocess.Popen(
                [sys.executable, worker, str(tree), kind, str(rank), str(port)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=tree,
            )
            for rank in range(RANKS[kind])
        ]  # fmt: skip

    def _answers(self) -> list[list[object]]:
        lines = [process.stdout.readline() for process in self.processes if process.stdout]
        if not all(lines):
            raise SystemExit("a side ended before its answer; what it printed stands above")
        return [json.loads(line) for line in lines]

    def contestants(self) -> list[str]:
        """Their names, when all processes are ready."""
        return [str(name) for name in self._answers()[0]]

    def train(self, name: str, first: int, count: int) -> Answer:
        """`count` steps of one contestant on the batches from number `first`."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{name} {first} {count}\n")
            process.stdin.flush()
        walls, cpus, losses = zip(*self._answers(), strict=True)
        return Answer(max(walls), sum(cpus), losses[0])

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def tree_of(commit: str, folder: Path) -> Path:
    """The files of a commit, written into an empty folder."""
    known = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", "-q", f"{commit}^{{commit}}"],
        capture_output=True, text=True,
    )  # fmt: skip
    if known.returncode:
        raise SystemExit(f"AGAINST={commit}: no such commit in {ROOT.name}; git log shows them")
    files = subprocess.Popen(
        ["git", "-C", str(ROOT), "archive", known.stdout.strip()], stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], stdin=files.stdout, check=True)
    if files.wait():
        raise SystemExit(f"git archive {commit} failed")
    return folder


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, _, high = statistics.quantiles(values, n=4)
    return low, statistics.median(values), high


def row(name: str, rounds: list[tuple[Answer, Answer, Answer]]) -> tuple[str, bool]:
    """A row of the table from (this tree, the commit, the commit again), and whether it is met."""
    low, middle, high = quartiles([base.wall / ours.wall for ours, base, _ in rounds])
    self_low, itself, self_high = quartiles([base.wall / again.wall for _, base, again in rounds])
    work = statistics.median(base.cpu / ours.cpu for ours, base, _ in rounds)
    apart = max(abs(ours.loss - base.loss) / base.loss for ours, base, _ in rounds)
    met = middle >= LEAST and middle >= self_low
    return (
        f"| {name} | {middle:.3f} | {low:.3f}-{high:.3f} | {itself:.3f} | {self_low:.3f}-{self_high:.3f} "
        f"| {work:.3f} | {apart:.1e} | {'met' if met else 'MISSED'} |"
    ), met


def compare(sides: list[Side], name: str, rounds: int, count: int) -> tuple[str, bool]:
    """One contestant of the three sides, in turn."""
    for side in sides:
        side.train(name, 0, 2)
    found: list[tuple[Answer, Answer, Answer]] = []
    for number in range(rounds):
        answers: dict[int, Answer] = {}
        for turn in range(3):
            who = (number + turn) % 3 if number % 2 else (number - turn) % 3
            answers[who] = sides[who].train(name, 2 + number * count, count)
        found.append((answers[0], answers[1], answers[2]))
    return row(name, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(RANKS))
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=15, help="alternations, at least 2")
    parser.add_argument("--steps", type=int, default=3, help="steps of a side in one alternation")
    parser.add_argument("--only", nargs="*", default=[], help="these contestants alone")
    asked = parser.parse_args()
    if asked.rounds < 2:
        parser.error(f"--rounds {asked.rounds}: quartiles need at least 2")
    print(
        f"{platform.machine()}, {os.cpu_count()} processors, load before {os.getloadavg()[0]:.1f}; "
        f"{asked.rounds} alternations of {asked.steps} steps",
        flush=True,
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="against-")))
        other = tree_of(asked.commit, folder)
        errors = stack.enter_context(open(2, "wb", closefd=False))
        sides = [stack.enter_context(Side(t, asked.kind, errors)) for t in (ROOT, other, other)]
        names = [side.contestants() for side in sides]
        both = [name for name in names[0] if name in names[1] and name in (asked.only or names[0])]
        if not both:
            raise SystemExit(f"--only {' '.join(asked.only)}: there are {', '.join(names[0])}")
        print(
            f"| contestant | speed beside {asked.commit} | quartiles | it beside itself | quartiles "
            "| by CPU time | losses apart | goal |\n|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        missed = 0
        for name in both:
            line, met = compare(sides, name, asked.rounds, asked.steps)
            missed += not met
            print(line, flush=True)
    print(f"load after {os.getloadavg()[0]:.1f}; {len(both) - missed} of {len(both)} met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
