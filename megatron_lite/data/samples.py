"""What a dataset gives: records of tokens, where loss counts, where documents end, and what else it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a batch; token t predicts token t + 1.

    tokens: int64 [s + 1]; loss_mask: float32 [s], 0 where the prediction does not count, None where all
    do.  segments: int32 [n + 1], cumulative lengths 0, ..., s of what was packed into the inputs: none
    sees another, positions begin at 0 in each; None leaves it to the EOD tokens and the run's flags.
    extras: arrays for the objective, of one shape and number format in all samples of a dataset.
    """

    tokens: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32] | None = None
    segments: npt.NDArray[np.int32] | None = None
    extras: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


class Samples(Protocol):
    """What a loader reads: a number of samples of seq_length + 1 tokens each."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int, /) -> Sample: ...

    def content(self) -> str:
        """Names what is read: the same for copies that lie elsewhere, for others another."""
        ...


def require_in_vocabulary(
    tokens: npt.NDArray[np.int64], vocab_size: int | None, where: str
) -> None:
    """Raise DataError for an id that the vocabulary does not have."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        wrong = low if low < 0 else high
        raise DataError(
            f"{where} holds token id {wrong}, the vocabulary has {vocab_size} - use the vocabulary "
            "the data was made with"
        )
