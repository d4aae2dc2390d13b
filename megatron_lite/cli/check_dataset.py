"""Verify token pairs completely: every length, offset, document bound and token; hashes if recorded.

python tools/check_dataset.py PREFIX [PREFIX ...] [--vocab-size N] [--eod ID]
python tools/check_dataset.py PREFIX --repair OUT     rebuild what Megatron-DeepSpeed's --append-eod broke

Ends with 3 where a pair is broken, having named what is wrong with each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.indexed import bin_path
from megatron_lite.data.preparing.check import CheckReport, check_hashes, repair, verify
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, check_prefix, pair_paths, require_room


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="path of a pair without .bin/.idx")
    parser.add_argument("--vocab-size", type=int, help="no token may be this or above")
    parser.add_argument("--eod", type=int, help="count the documents that end with this id")
    parser.add_argument("--repair", metavar="OUT", help="write the pair anew under this prefix")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, or repair; returns the exit code."""
    asked = _parse(sys.argv[1:] if argv is None else argv)
    if asked.repair is not None:
        if len(asked.prefix) != 1:
            raise ConfigError("--repair takes one PREFIX")
        check_prefix("--repair", asked.repair)
        check_outputs("--repair", pair_paths(asked.repair)[:2], Disk())
        return _repair(asked.prefix[0], asked.repair, asked)
    problems = []
    for prefix in asked.prefix:
        try:
            _print(prefix, _check(prefix, asked))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return 0


def _check(prefix: str, asked: argparse.Namespace) -> CheckReport:
    report = verify(prefix, vocab_size=asked.vocab_size, eod=asked.eod)
    check_hashes(prefix)
    return report


def _print(prefix: str, report: CheckReport) -> None:
    parts = [
        f"{report.documents:,} documents ({report.empty_documents:,} empty)",
        f"{report.sequences:,} sequences",
        f"{report.tokens:,} tokens of {report.dtype}",
    ]
    if report.tokens:
        parts.append(f"ids {report.lowest} to {report.highest}")
    if report.ended_by_eod is not None:
        parts.append(f"{report.ended_by_eod:,} documents end with the EOD")
    print(f"{prefix}: good: {', '.join(parts)}")


def _repair(prefix: str, out: str, asked: argparse.Namespace) -> int:
    disk = Disk()
    require_room("--repair", Path(out).absolute().parent, bin_path(prefix).stat().st_size, disk)
    disk.make_folder(Path(out).absolute().parent)
    eod = repair(prefix, out, disk)
    print(f"{prefix}: repaired as {out}; every document ends with token {eod}")
    _print(out, verify(out, vocab_size=asked.vocab_size, eod=eod))
    return 0


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
