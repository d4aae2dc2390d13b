"""The last word: a run that was stopped and resumed is, to the last bit, the one that was not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.telemetry.record import StepRecord, read_metrics


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="verdict.py", description=__doc__)
    parser.add_argument("whole", help="run folder of the run without a stop")
    parser.add_argument("stopped", help="run folder of the one that was resumed")
    return parser.parse_args()


def steps_of(folder: Path) -> list[tuple[object, ...]]:
    """What must not depend on a stop, of every step."""
    found = [r for r in read_metrics(folder / "metrics.jsonl") if isinstance(r, StepRecord)]
    if not found:
        raise DataError(f"{folder / 'metrics.jsonl'} has no step - did the training end?")
    return [(r.iteration, r.samples, r.loss, r.grad_norm, r.learning_rate) for r in found]


def hashes_of(folder: Path, iteration: int) -> dict[str, object]:
    """The hash of every tensor file of a checkpoint."""
    files = read_manifest(folder / f"iter_{iteration:07d}").files
    return {name: file for name, file in files.items() if name.endswith(".safetensors")}


def main() -> int:
    arguments = parse_arguments()
    whole, stopped = Path(arguments.whole), Path(arguments.stopped)
    ours, theirs = steps_of(whole), steps_of(stopped)
    last = int(str(ours[-1][0]))
    other = [a[0] for a, b in zip(ours, theirs, strict=False) if a != b]
    same_files = hashes_of(whole, last) == hashes_of(stopped, last)
    print(f"steps: {len(ours)} without a stop, {len(theirs)} with one; {len(other)} differ")
    print(
        f"checkpoint {last}: the tensor files are {'the same' if same_files else 'NOT the same'} bytes"
    )
    start, end = float(str(ours[0][2])), float(str(ours[-1][2]))
    print(f"loss: {start:.3f} in the first step, {end:.3f} in the last")
    fine = len(ours) == len(theirs) and not other and same_files and end < start
    print("exactly resumed" if fine else f"NOT resumed exactly, first at step {other[:1] or '?'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(run_tool(main, results=True))
