"""Synthetic documents for tests and benchmarks: counting up, of random lengths, ended by EOD."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class MockTokens:
    """Documents 1, 2, 3, ... EOD modulo the vocabulary; lengths equal Megatron's --mock-data."""

    def __init__(self, vocab_size: int, eod: int, num_documents: int = 100_000) -> None:
        self.vocab_size = vocab_size
        self.eod = eod
        random = np.random.default_rng(0)
        self._lengths = random.integers(1, 4096, size=num_documents, dtype=np.int32)

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every document, EOD included."""
        return self._lengths

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[np.int64]:
        """`length` tokens (the rest by default) of a document from token `offset` on."""
        size = int(self._lengths[index])
        stop = size if length is None else offset + length
        tokens = np.arange(offset + 1, stop + 1, dtype=np.int64) % self.vocab_size
        if stop == size:
            tokens[-1] = self.eod
        return tokens

    def fingerprint(self) -> str:
        """Names the content."""
        return f"mock {self.vocab_size} {self.eod} {len(self._lengths)}"

    def content(self) -> str:
        """As fingerprint: there are no files."""
        return self.fingerprint()
