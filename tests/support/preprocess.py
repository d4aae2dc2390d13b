"""tools/preprocess_data.py in this process, its inputs, and hashes of what it wrote."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.cli import preprocess_data
from megatron_lite.config.exit import run_tool
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.preparing.encode import Job
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.storage.disk import Disk
from tests.support.places import ROOT

TOOL = ROOT / "tools" / "preprocess_data.py"
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The tool in this process, so that a case costs milliseconds."""
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *map(str, arguments)])
    return run_tool(preprocess_data.main)


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def hashes(folder: Path, pattern: str = "*document.[bi]*") -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern)
    }


def job(**given: Any) -> Job:
    return Job(DataConfig(tokenizer_type="NullTokenizer"), 1000, **given)


def attempt(source: str, folder: Path, disk: Disk, resume: bool) -> None:
    """Two keys of a corpus in batches of a few lines, each of them marked."""
    preprocess(
        job(keys=("text", "b"), append_eod=True), inputs=[source],
        output_prefix=str(folder / "x"), workers=1, disk=disk, resume=resume,
        batch_bytes=300, mark_seconds=0,
    )  # fmt: skip


def numbers(path: Path, count: int, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    return str(
        write_lines(
            path,
            *(
                {"text": " ".join(map(str, random.integers(0, 999, n))), "b": f"{n}"}
                for n in random.integers(0, 30, count)
            ),
        )
    )
