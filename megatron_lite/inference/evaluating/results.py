"""What an evaluation found: a table for people, JSON for programs, a file in the run folder."""

from __future__ import annotations

import json
import secrets
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import write_output
from megatron_lite.telemetry.record import as_json

EVALUATIONS = "evaluations"
"""In a run folder: a file for each call of tools/evaluate.py, beside the training's own records."""


@dataclass(frozen=True, slots=True)
class Result:
    """One exam of one file or folder.

    rows: what is printed: a heading, then a line each; values: what JSON gets; notes: said below.
    """

    kind: str
    source: str
    rows: Sequence[Sequence[str]]
    values: Mapping[str, Any]
    notes: Sequence[str] = field(default=())


def side_by_side(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, numbers to the right; wide characters take two places."""
    rows = [[_visible(cell) for cell in row] for row in rows]
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0] + " " * (widths[0] - _width(row[0]))]
        cells += [
            " " * (width - _width(cell)) + cell
            for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _visible(text: str) -> str:
    """A name from a file cannot move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def record_of(head: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """What is kept of them.  head: what was evaluated, and how."""
    found = [{"kind": one.kind, "source": one.source, **one.values} for one in results]
    return {**head, "results": found}


def keep_record(run: Path, iteration: int, record: Mapping[str, Any], disk: Disk) -> Path:
    """A file of its own in the run folder, which replaces none; nothing else of the run is touched."""
    moment = time.strftime("%Y-%m-%d_%H-%M-%S")
    name = f"iter_{iteration:07d}_{moment}_{secrets.token_hex(3)}.json"
    write_output(run / EVALUATIONS / name, json_text(record), disk)
    return run / EVALUATIONS / name


def json_text(record: Mapping[str, Any]) -> bytes:
    """As it is written."""
    text = json.dumps(as_json(record), ensure_ascii=False, allow_nan=False, indent=1)
    return text.encode() + b"\n"
