"""`make parity`: one line per layout, `<name> ok|FAIL <largest relative difference>`; exit 1 on FAIL."""

from __future__ import annotations

import sys
import time

from tests.parity.compare import compare, passes
from tests.parity.layouts import LAYOUTS


def main() -> int:
    """Compare every layout, or those whose names are given."""
    wanted = [entry for entry in LAYOUTS if not sys.argv[1:] or entry.name in sys.argv[1:]]
    unknown = set(sys.argv[1:]) - {entry.name for entry in LAYOUTS}
    if unknown:
        print(f"no layout {', '.join(sorted(unknown))}; there are: "
              f"{', '.join(entry.name for entry in LAYOUTS)}", file=sys.stderr)  # fmt: skip
        return 2
    failed, began = 0, time.monotonic()
    for entry in wanted:
        difference = compare(entry)
        good = passes(entry, difference)
        failed += not good
        print(
            f"{entry.name:28s} {'ok' if good else 'FAIL'} {difference.largest:.1e}   "
            f"loss {difference.loss:.1e}  grad norm {difference.grad_norm:.1e}  "
            f"gradients {difference.gradients:.1e}  parameters {difference.parameters:.1e}",
            flush=True,
        )
    print(f"{len(wanted) - failed} of {len(wanted)} layouts equal the serial run, all with ragged "
          f"loss masks and hidden dropout 0.1, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
