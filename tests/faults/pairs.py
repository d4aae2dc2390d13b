"""A token file to damage, and the tokenizer of its ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.corpora import write_pair

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "60"]


def pair(folder: Path, *documents: list[int]) -> Path:
    """A .bin/.idx pair; 40 documents of 30 tokens below 60 by default."""
    random = np.random.default_rng(0)
    found = documents or [random.integers(0, 60, 30).tolist() for _ in range(40)]
    return Path(write_pair(folder / "d", found, np.uint16))
