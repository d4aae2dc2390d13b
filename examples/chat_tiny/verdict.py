"""The last word: how many of the questions a tuned model answers as it was taught, by tools/chat.py."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.config.errors import DataError, MegatronLiteError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.preparing.dialogues import Dialogues

CHAT = Path(__file__).resolve().parents[2] / "tools" / "chat.py"


class Turn(NamedTuple):
    """A question, the answer that was taught, and whether it begins a talk."""

    question: str
    answer: str
    first: bool


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="verdict.py", description=__doc__)
    parser.add_argument("talks", type=Path, help="the JSON lines that was learned")
    parser.add_argument("run", help="run folder of the tuned model")
    parser.add_argument("--least", type=float, default=0.95, help="share of right answers; 0.95")
    return parser.parse_args()


def turns_of(talks: Path) -> list[Turn]:
    """What was asked and answered, in order; of texts of one line."""
    read, found = Dialogues(), []
    for line in talks.read_text(encoding="utf-8").splitlines():
        messages = [m for m in read(json.loads(line)).messages if m.role != "system"]
        for n in range(0, len(messages), 2):
            found.append(Turn(messages[n].content, messages[n + 1].content, n == 0))
    return [turn for turn in found if "\n" not in turn.question + turn.answer]


def answers_of(turns: Sequence[Turn], run: str) -> list[str]:
    """What the model says to each."""
    lines = ("/reset\n" * turn.first + turn.question + "\n" for turn in turns)
    words = ["--load", run, "--temperature", "0", "--max-new-tokens", "60", "--use-cpu"]
    done = subprocess.run(
        [sys.executable, str(CHAT), *words],
        input="".join(lines), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise MegatronLiteError(f"tools/chat.py ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout.splitlines()


def main() -> int:
    """1 where too few answers are the ones that were taught."""
    asked = parse_arguments()
    turns = turns_of(asked.talks)
    if not turns:
        raise DataError(f"{asked.talks} has no question of one line")
    answers = answers_of(turns, asked.run)
    right = [
        turn.answer.strip() == said.strip() for turn, said in zip(turns, answers, strict=False)
    ]
    for turn, said in list(zip(turns, answers, strict=False))[:5]:
        print(f"> {turn.question}\n{said}")
    share = sum(right) / len(turns)
    print(f"{sum(right)} of {len(turns)} answers are the ones that were taught ({share:.1%})")
    if share < asked.least:
        print(f"fewer than {asked.least:.0%}: more STEPS or EPOCHS", file=sys.stderr)
    return int(share < asked.least)


if __name__ == "__main__":
    sys.exit(run_tool(main))
