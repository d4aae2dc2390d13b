"""What a microbatch is: tokens, where they stand in the training stream, and where loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch of b samples; token t predicts token t + 1.

    tokens: int64 [b, s + 1]; sample_numbers: int64 [b], positions in the global training stream,
    the same whatever the layout; loss_mask: float32 [b, s], 0 where the prediction does not count.
    """

    tokens: npt.NDArray[np.int64]
    sample_numbers: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]


def collate(
    samples: Sequence[npt.NDArray[np.int64]],
    sample_numbers: npt.NDArray[np.int64],
    *,
    eod: int | None = None,
    eod_mask_loss: bool = False,
) -> Batch:
    """samples: b of int64 [s + 1].  eod_mask_loss: no loss where the *input* token is EOD."""
    tokens = np.stack(samples)
    loss_mask = np.ones((tokens.shape[0], tokens.shape[1] - 1), dtype=np.float32)
    if eod_mask_loss:
        assert eod is not None, "--eod-mask-loss needs an EOD id"
        loss_mask[tokens[:, :-1] == eod] = 0.0
    return Batch(tokens, sample_numbers, loss_mask)
