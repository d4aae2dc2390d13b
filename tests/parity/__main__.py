"""`make parity`, `make parity-all`: layouts against the serial run, a line each; exit 1 if one differs.

python -m tests.parity [--all] [--write FILE.md] [--engine NAME] [layout ...]
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from pathlib import Path

from tests.parity.compare import Difference, compare, passes
from tests.parity.kinds import Layout
from tests.parity.layouts import LAYOUTS, QUICK, WRONG
from tests.parity.report import document, row
from tests.support.engines import OF_EVERY_LAYOUT


def main() -> int:
    """Compare the quick layouts, all of them, or those whose names are given."""
    parser = ArgumentParser(prog="python -m tests.parity")
    parser.add_argument("names", nargs="*", metavar="layout")
    parser.add_argument("--all", action="store_true", help="all layouts, not only the quick ones")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table as Markdown")
    parser.add_argument("--engine", choices=OF_EVERY_LAYOUT, default="zero")
    asked = parser.parse_args()
    unknown = set(asked.names) - {entry.name for entry in LAYOUTS}
    if unknown:
        print(f"no layout {', '.join(sorted(unknown))}; there are: "
              f"{', '.join(entry.name for entry in LAYOUTS)}", file=sys.stderr)  # fmt: skip
        return 2
    wanted = [
        entry for entry in (LAYOUTS if asked.all or asked.names else QUICK)
        if not asked.names or entry.name in asked.names
    ]  # fmt: skip
    began = time.monotonic()
    found = [_shown(entry, asked.engine) for entry in wanted]
    wrong = [_shown(entry, asked.engine) for entry in WRONG] if asked.write else []
    failed = sum(not passes(entry, difference) for entry, difference in found)
    print(f"{len(wanted) - failed} of {len(wanted)} layouts equal the serial run, all with ragged "
          f"loss masks and hidden dropout 0.1, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    if asked.write:
        asked.write.write_text(document(found, wrong), encoding="utf-8")
        print(f"written to {asked.write}")
    return 1 if failed else 0


def _shown(entry: Layout, engine: str) -> tuple[Layout, Difference]:
    difference = compare(entry, engine)
    print(row(entry, difference), flush=True)
    return entry, difference


if __name__ == "__main__":
    sys.exit(main())
