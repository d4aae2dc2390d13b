"""The model under test, with what every exam needs beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.inference.evaluating.results import Result
from megatron_lite.inference.evaluating.scorer import Scorer
from megatron_lite.models.decoder import Decoder

Advance = Callable[[int], object]
"""So many more are done."""

Bars = Callable[[str, int, str], AbstractContextManager[Advance]]
"""(what, how many in all, of which unit) -> a bar while they are done."""


def unseen(what: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """Default: no bar."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True, slots=True)
class Examinee:
    """scorer: of this rank's part of the model."""

    scorer: Scorer
    tokenizer: Tokenizer
    progress: Bars = unseen

    @property
    def model(self) -> Decoder:
        """This rank's part of it."""
        return self.scorer.model


class Exam(Protocol):
    """One thing that is measured, of one file or folder."""

    def look(self, model: ModelConfig, tokenizer: Tokenizer) -> Sequence[str]:
        """Read and check the files before the model's weights are read; returns what to say about them."""
        ...

    def run(self, examinee: Examinee) -> Result:
        """Collective over the model's ranks, all of which get the same result."""
        ...
