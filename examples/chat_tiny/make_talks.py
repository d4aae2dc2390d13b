"""Questions and answers that are made up: colours and places of things, in talks of one turn and of two."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.storage.disk import Disk, write_atomically

COLOURS = {
    "file": "red", "module": "green", "list": "blue", "string": "white", "class": "black",
    "server": "red", "thread": "yellow", "table": "green", "socket": "blue", "queue": "white",
}  # fmt: skip
PLACES = {
    "Ada": "in the library", "Ben": "on the disk", "Eve": "in the memory", "Tom": "behind the door",
    "Mia": "under the tree", "Leo": "on the table",
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="make_talks.py", description=__doc__)
    parser.add_argument("file", type=Path, help="JSON lines of messages")
    parser.add_argument("--seed", type=int, default=1, help="of their order")
    return parser.parse_args()


def talk(*said: str) -> dict[str, Any]:
    """Questions and answers in turn."""
    roles = ("user", "assistant") * len(said)
    return {"messages": [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]}


def talks() -> Iterator[dict[str, Any]]:
    """200: what a thing of somebody's is like, where it is, and both, in one talk or one answer."""
    for (thing, colour), (name, place) in itertools.product(COLOURS.items(), PLACES.items()):
        what = f"What colour is the {thing} of {name}?"
        yield talk(what, f"It is {colour}.")
        yield talk(f"Where is the {thing} of {name}?", f"It is {place}.")
        if name in ("Ada", "Ben", "Eve", "Tom"):
            yield talk(what, f"It is {colour}.", "And where?", f"It is {place}.")
            yield talk(f"Tell me about the {thing} of {name}.", f"It is {colour} and {place}.")


def main() -> int:
    """Write them in an order of their own."""
    asked = parse_arguments()
    found = list(talks())
    random.Random(asked.seed).shuffle(found)
    lines = "".join(json.dumps(one) + "\n" for one in found)
    write_atomically(asked.file, lines.encode(), Disk())
    print(f"{asked.file}: {len(found)} talks, of which the first is {found[0]['messages']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
