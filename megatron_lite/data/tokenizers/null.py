"""Numbers instead of words: for data that is tokenized already, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.errors import DataError
from megatron_lite.data.tokenizers.base import short_hash
from megatron_lite.data.tokenizers.engines import (
    AUTO,
    Candidate,
    EngineChoice,
    EngineTokenizer,
    FunctionEngine,
)


class NullTokenizer(EngineTokenizer):
    """Text is ids separated by spaces; EOD is one more id after the vocab_size given ones."""

    def __init__(self, vocab_size: int | None, *, engine: str = AUTO) -> None:
        if vocab_size is None or vocab_size < 1:
            raise DataError("NullTokenizer needs --vocab-size, the number of ids without EOD")
        self._words = vocab_size
        plain = Candidate("plain", lambda: FunctionEngine("plain", self._numbers))
        self.choice = EngineChoice([plain], reference=("plain",), asked=engine)

    @property
    def vocab_size(self) -> int:
        """The given size and EOD."""
        return self._words + 1

    @property
    def eod(self) -> int:
        """The id after the given ones."""
        return self._words

    def _numbers(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(f"NullTokenizer takes numbers separated by spaces: {error}") from error
        for number in ids:
            if not 0 <= number < self._words:
                raise DataError(f"id {number} is not below --vocab-size {self._words}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers as text."""
        return " ".join(str(number) for number in ids)

    def fingerprint(self) -> str:
        """A hash of the size."""
        return short_hash(str(self._words).encode())
