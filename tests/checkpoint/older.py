"""Checkpoints that an older commit wrote, and what it computed from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "ec47cc8"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
"""Losses and hashes, by the name of a run."""
ADAM = [
    "--hidden-size", "16", "--hidden-dropout", "0.1", "--weight-decay", "0.1", "--train-iters", "8",
    "--lr-decay-iters", "12", "--split", "1,0,0", "--data-path", str(FOLDER / "numbers"),
    "--load", str(FOLDER / "adam"), "--save-interval", "100",
]  # fmt: skip

"""The command line that goes on from its checkpoint of AdamW, for five steps."""
