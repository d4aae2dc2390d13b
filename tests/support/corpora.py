"""Small token files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder


def write_pair(
    prefix: str | Path, documents: Iterable[Sequence[int]], dtype: npt.DTypeLike = np.int32
) -> str:
    """The .bin/.idx pair of documents of one sequence each; returns the prefix."""
    with IndexedDatasetBuilder(f"{prefix}.bin", dtype) as builder:
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize()
    return str(prefix)


def growing(count: int, factor: int, modulus: int = 60) -> Iterable[list[int]]:
    """Documents of 5 to 27 tokens below the modulus, each with the modulus at its end."""
    for number in range(count):
        yield [(number * factor + k * k) % modulus for k in range(5 + number % 23)] + [modulus]
