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
    positions: int64 [b, s], counted from 0 in every document; None: in the sample.
    documents: int32 [b, s], numbers of documents that do not see one another; None: all see all.
    """

    tokens: npt.NDArray[np.int64]
    sample_numbers: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64] | None = None
    documents: npt.NDArray[np.int32] | None = None


def collate(
    samples: Sequence[npt.NDArray[np.int64]],
    sample_numbers: npt.NDArray[np.int64],
    *,
    eod: int | None = None,
    eod_mask_loss: bool = False,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
) -> Batch:
    """samples: b of int64 [s + 1].  A document ends with its EOD, which still belongs to it.

    eod_mask_loss: no loss where the *input* token is EOD.
    """
    tokens = np.stack(samples)
    inputs = tokens[:, :-1]
    loss_mask = np.ones(inputs.shape, dtype=np.float32)
    positions, documents = None, None
    if eod_mask_loss or reset_position_ids or reset_attention_mask:
        assert eod is not None, "document boundaries need an EOD id"
        ends = inputs == eod
        if eod_mask_loss:
            loss_mask[ends] = 0.0
        begins = np.zeros_like(ends)
        begins[:, 1:] = ends[:, :-1]
        if reset_position_ids:
            place = np.arange(inputs.shape[1], dtype=np.int64)
            positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        if reset_attention_mask:
            documents = np.cumsum(begins, axis=1, dtype=np.int32)
    return Batch(tokens, sample_numbers, loss_mask, positions, documents)
