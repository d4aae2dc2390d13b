"""The demo's last word: the model beside models that only count; exit 1 if the bigram wins."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.telemetry.record import EvaluationRecord, read_metrics

MEANING = {
    "unigram": "knows how often each token stands in the training text",
    "bigram": "counts which token follows which (interpolated Kneser-Ney); the mark to beat",
    "trigram": "counts what follows every two tokens; beating it takes more text and time",
    "model": "the GPT trained here",
}
MARK = "bigram"


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="verdict.py", description=__doc__)
    parser.add_argument("run", help="run folder that holds metrics.jsonl and ngrams.json")
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
    counted = json.loads((run / "ngrams.json").read_text(encoding="utf-8"))
    scores = {
        name: (found["loss"], found["perplexity"]) for name, found in counted["models"].items()
    }
    scores["model"] = (ours.loss, ours.perplexity)
    print("on text that none of them has seen (the test split):")
    print(f"{'':10s}{'loss':>8s}{'perplexity':>12s}")
    for name, (loss, perplexity) in scores.items():
        print(f"{name:10s}{loss:8.4f}{perplexity:12.2f}   {MEANING[name]}")
    print("loss: mean of -ln(probability given to the token that came); lower is better")
    print("perplexity: e to the loss; as unsure as between so many equally likely tokens")
    print(f"checkpoints, metrics.jsonl and TensorBoard events: {run}")
    for picture in sorted(run.glob("*.png")):
        print(f"loss curve: {picture}")
    won = ours.perplexity < scores[MARK][1]
    print(f"the model {'beats' if won else 'does NOT beat'} the {MARK}")
    return 0 if won else 1


if __name__ == "__main__":
    sys.exit(run_tool(main, results=True))
