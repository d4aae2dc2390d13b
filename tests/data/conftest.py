"""Small token files for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder

WriteDocuments = Callable[..., Path]


@pytest.fixture
def write_documents(tmp_path: Path) -> WriteDocuments:
    """write_documents(name, count, seed) -> prefix of `count` random documents ending in id 99."""

    def write(name: str, count: int, seed: int = 0, longest: int = 40) -> Path:
        random = np.random.default_rng(seed)
        prefix = tmp_path / name
        with IndexedDatasetBuilder(f"{prefix}.bin", np.uint16) as builder:
            for _ in range(count):
                tokens = random.integers(0, 99, random.integers(0, longest))
                builder.add_document(np.append(tokens, 99), [len(tokens) + 1])
            builder.finalize(f"{prefix}.idx")
        return prefix

    return write
