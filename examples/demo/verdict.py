"""The demo's last word: test loss and perplexity beside the unigram's; exit 1 if not half of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.telemetry.record import EvaluationRecord, read_metrics

SHARE = 0.5
"""The model's perplexity must be at most this share of the unigram's."""


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="verdict.py", description=__doc__)
    parser.add_argument("run", help="run folder that holds metrics.jsonl and unigram.json")
    return parser.parse_args()


def main() -> int:
    run = Path(parse_arguments().run)
    metrics = run / "metrics.jsonl"
    tests = [
        record
        for record in read_metrics(metrics)
        if isinstance(record, EvaluationRecord) and record.split == "test"
    ]
    if not tests:
        raise DataError(f"{metrics} has no evaluation on the test split - did the training end?")
    ours = tests[-1]
    unigram = json.loads((run / "unigram.json").read_text(encoding="utf-8"))
    print(f"{'':12s}{'test loss':>12s}{'perplexity':>12s}")
    print(f"{'model':12s}{ours.loss:12.4f}{ours.perplexity:12.2f}")
    print(f"{'unigram':12s}{unigram['loss']:12.4f}{unigram['perplexity']:12.2f}")
    share = ours.perplexity / unigram["perplexity"]
    print(f"the model's perplexity is {share:.1%} of the unigram's (at most {SHARE:.0%} is asked)")
    print(f"checkpoints, metrics.jsonl and TensorBoard events: {run}")
    for picture in sorted(run.glob("*.png")):
        print(f"loss curve: {picture}")
    return 0 if share <= SHARE else 1


if __name__ == "__main__":
    sys.exit(run_tool(main, results=True))
