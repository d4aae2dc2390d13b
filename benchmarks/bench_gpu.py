"""`make bench-gpu`: our trainer beside compiled GPT-2 and Hugging Face's Llama on one GPU.

    make bench-gpu                       the table: 124m and 8b, under five minutes
    make bench-gpu ONLY=124m|8b|fp16|documents|all
    python benchmarks/bench_gpu.py       with the torch that is there; what is missing is a row that says so

All contestants run in this process, in turns of some steps without a wait inside, from the same
first weights on the same tokens; ratios are medians over the rounds.  --rehearse runs the same
program at toy sizes on a CPU.  The exit code is 1 where something asked was missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu.cases import CASES, chosen
from benchmarks.gpu.report import report
from benchmarks.gpu.turns import measure


def main(argv: list[str] | None = None) -> int:
    """All chosen cases; 1 where something asked was missed on a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="CASE", help=f"{', '.join(CASES)} or all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write rows and verdicts there")
    parser.add_argument(
        "--rehearse", action="store_true", help="toy sizes on a CPU: proves nothing"
    )
    asked = parser.parse_args(argv)
    cases = chosen(asked.only, tiny=asked.rehearse)
    if not asked.rehearse and not torch.cuda.is_available():
        print(
            "bench-gpu: no GPU here; nothing was measured (--rehearse tries the program on a CPU)"
        )
        return 0
    device = torch.device("cpu" if asked.rehearse else "cuda:0")
    card = "CPU, toy sizes" if asked.rehearse else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}")
    results, missed = [], False
    for case in cases:
        found = measure(case, device, rounds=asked.rounds, steps=asked.steps)
        made, judged = report(case, found, device)
        missed |= not all(met for _, met in judged)
        results.append({"case": case.key, "rows": [asdict(line) for line in made],
                        "asked": [{"what": text, "met": met} for text, met in judged]})  # fmt: skip
    if asked.json:
        asked.json.write_text(
            json.dumps({"card": card, "torch": torch.__version__, "cases": results}, indent=1)
        )
        print(f"\nwritten: {asked.json}")
    return int(missed and not asked.rehearse)


if __name__ == "__main__":
    sys.exit(main())
