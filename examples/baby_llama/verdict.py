"""The last word: every run has learned, and texts four times as long are read no worse than short ones."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.telemetry.record import StepRecord, read_metrics

RUNS = ("pretrained", "answers", "adapters", "long")
WORSE = 1.1
"""Perplexity of a stretched model at the old length over what it was, at most."""


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="verdict.py", description=__doc__)
    parser.add_argument("out", help="the folder of the runs and of what was measured")
    return parser.parse_args()


def losses_of(folder: Path) -> list[float]:
    """Of all optimizer steps of a run."""
    records = read_metrics(folder / "metrics.jsonl")
    found = [record.loss for record in records if isinstance(record, StepRecord)]
    if not found:
        raise DataError(f"{folder / 'metrics.jsonl'} has no step - did the training end?")
    return found


def ends_of(losses: list[float]) -> tuple[float, float]:
    """Means of the first five and of the last twenty."""
    first, last = losses[:5], losses[-20:]
    return sum(first) / len(first), sum(last) / len(last)


def perplexity(path: Path) -> float:
    """As tools/evaluate.py has measured it."""
    found: dict[str, Any] = json.loads(path.read_bytes())
    (result,) = found["results"]
    return float(result["perplexity"])


def main() -> int:
    out = Path(parse_arguments().out)
    losses = {name: losses_of(out / name) for name in RUNS}
    for name, found in losses.items():
        print(
            f"{name:10}  loss {ends_of(found)[0]:.3f} -> {ends_of(found)[1]:.3f} in {len(found)} steps"
        )
    before, short, long = (
        perplexity(out / f"{name}.json") for name in ("pretrained", "long-short", "long")
    )
    print(
        f"perplexity  {before:.1f} as pretrained; stretched {short:.1f} at that length, "
        f"{long:.1f} at four times it"
    )
    holds = {
        "a loss is no number": all(
            math.isfinite(one) for found in losses.values() for one in found
        ),
        **{
            f"nothing was learned in {name}": ends_of(losses[name])[1] < ends_of(losses[name])[0]
            for name in ("pretrained", "answers", "adapters")
        },
        "stretched, it reads short texts worse": short <= WORSE * before,
        "a longer text does not help": long <= WORSE * short,
    }
    for what, fine in holds.items():
        if not fine:
            print(f"NOT as it should be: {what}")
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main, results=True))
