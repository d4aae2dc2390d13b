"""Files that are kept, and a check of each that says whether damage to them is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.cache import build_or_load
from megatron_lite.data.preparing.check import verify_blends
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.storage.disk import Disk
from tests.support.preprocess import job, numbers


def arrays() -> list[tuple[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [(name, random.integers(0, 1 << 40, size)) for name, size in (("a", 100), ("b", 7))]


def pair(folder: Path) -> Callable[[Path], str]:
    source = numbers(folder / "a.jsonl", 40)
    preprocess(job(append_eod=True), inputs=[source], output_prefix=str(folder / "x"), workers=1,
               disk=Disk())  # fmt: skip
    config = DataConfig(data_path=[str(folder / "x_text_document")])
    verify_blends(config, vocab_size=1001)
    names = ("bin", "idx")
    whole = {k: (folder / f"x_text_document.{k}").read_bytes() for k in names}

    def check(flipped: Path) -> str:
        try:
            verify_blends(config, vocab_size=1001)
        except DataError as error:
            assert str(folder / "x_text_document") in str(error)
            return "found: exit 3 names the file"
        same = {k: (folder / f"x_text_document.{k}").read_bytes() for k in names} == whole
        assert same, "verified although damaged"
        return "no effect"

    return check


def cache(folder: Path) -> Callable[[Path], str]:
    build_or_load(folder / "cache", {"seed": 1}, arrays, Disk())

    def check(flipped: Path) -> str:
        built = []

        def build() -> Any:
            built.append(1)
            return arrays()

        kept = build_or_load(folder / "cache", {"seed": 1}, build, Disk(), verify=True)
        for name, values in arrays():
            assert np.array_equal(kept.arrays[name], values)
        return "found: built anew" if built else "no effect"

    return check
