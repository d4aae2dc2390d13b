"""The last word on an fp16 run: not one NaN, hardly a skipped step, and the next shard began where it ended."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.telemetry.record import StepRecord, read_metrics

FIRST = 20
"""Steps in which the loss scale may still be looking for its place."""
SKIPPED = 0.01
"""Share of the later steps that may be skipped."""


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="verdict.py", description=__doc__)
    parser.add_argument("first", help="run folder of the first shard")
    parser.add_argument("last", help="run folder of the last one")
    return parser.parse_args()


def steps_of(folder: Path) -> list[StepRecord]:
    """All optimizer steps of a run."""
    records = read_metrics(folder / "metrics.jsonl")
    found = [record for record in records if isinstance(record, StepRecord)]
    if not found:
        raise DataError(f"{folder / 'metrics.jsonl'} has no step - did the training end?")
    return found


def mean_loss(steps: list[StepRecord]) -> float:
    return sum(step.loss for step in steps) / len(steps)


def main() -> int:
    arguments = parse_arguments()
    first, last = (steps_of(Path(folder)) for folder in (arguments.first, arguments.last))
    nan = sum(not math.isfinite(step.loss) for step in (*first, *last))
    later = [step for step in first if step.iteration > FIRST]
    skipped = sum(bool(step.skipped_iterations) for step in later)
    start, end = mean_loss(first[:5]), mean_loss(first[-5:])
    taken_over, final = mean_loss(last[:5]), mean_loss(last[-20:])
    print(f"losses that are no number: {nan} of {len(first) + len(last)}")
    print(f"skipped after step {FIRST}: {skipped} of {len(later)}; at most {SKIPPED:.0%} may be")
    print(
        f"mean loss: {start:.3f} in the first five steps, {end:.3f} in the last five of the first shard"
    )
    print(
        f"           {taken_over:.3f} in the first five of the last shard, {final:.3f} at its end"
    )
    holds = {
        "a loss is no number": nan == 0,
        "too many steps were skipped": skipped <= SKIPPED * len(later),
        "the next shard began anew": taken_over < (start + end) / 2,
        "nothing was learnt": final < start,
    }
    for what, fine in holds.items():
        if not fine:
            print(f"NOT as it should be: {what}")
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main, results=True))
