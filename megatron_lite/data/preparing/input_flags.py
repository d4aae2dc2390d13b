"""The flags that say which corpus is read and how; the same for every tool that reads one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, get_args

from megatron_lite.config.errors import ConfigError
from megatron_lite.data.preparing.parts import LONGEST_LINE, TextUnit

LARGEST_LINE_MB = 16384  # some copies of a line are in memory at a time


def add_input_flags(add: Callable[..., Any], *, keys: str, required: bool = True) -> None:
    """keys: what --json-keys means to this tool; required: whether --input must be given."""
    add(
        "--input", nargs="+", action="extend", required=required,
        help=".json/.jsonl (lines or one array), .parquet, .csv/.tsv, .txt, packed or not; files, "
        "globs or folders",
    )  # fmt: skip
    add("--json-keys", nargs="+", default=["text"], help=keys)
    add(
        "--template",
        help="text of a record, e.g. '{title}\\n\\n{content}'; see docs/guides/data.md",
    )
    add(
        "--text-unit", choices=get_args(TextUnit),
        help="what of a .txt file is a document: the file (default), a line, a paragraph",
    )  # fmt: skip
    add("--max-line-mb", type=float, default=LONGEST_LINE / 2**20,
        help="a longer line, element or text is a bad line (%(default)s)")  # fmt: skip
    add("--on-bad-line", choices=["error", "skip"], default="error")


def longest_line(arguments: argparse.Namespace) -> int:
    """--max-line-mb in bytes; ConfigError where that is no size."""
    size: float = arguments.max_line_mb
    if not 0 < size <= LARGEST_LINE_MB:
        raise ConfigError(f"--max-line-mb {size:g} must be above 0 and at most {LARGEST_LINE_MB}")
    return max(int(size * 2**20), 1)
