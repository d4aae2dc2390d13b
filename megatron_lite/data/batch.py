"""What a micro batch is: tokens, where they stand in the training stream, and where loss counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.documents import WITHOUT_ENDS, DocumentEnds
from megatron_lite.data.indices import Int32Array, Int64Array
from megatron_lite.data.samples import Sample

_NUMBERS = "biuf"
"""Kinds of numpy arrays that a device can hold."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro batch of b samples; token t predicts token t + 1.

    tokens: int64 [b, s + 1]; sample_numbers: int64 [b], positions in the global training stream,
    the same whatever the layout; loss_mask: float32 [b, s], 0 where the prediction does not count.
    positions: int64 [b, s], counted from 0 in every segment; None: in the sample.
    segments: int32 [n + 1], cumulative lengths 0, ..., b * s over the rows one after the other, of
    segments that do not attend to one another (a row's end always ends one); None: a row is one.
    extras: [b, ...] each, what the samples bring for the objective.
    """

    tokens: Int64Array
    sample_numbers: Int64Array
    loss_mask: npt.NDArray[np.float32]
    positions: Int64Array | None = None
    segments: Int32Array | None = None
    extras: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def longest_segment(self) -> int:
        """Tokens of the longest of them."""
        if self.segments is None:
            return int(self.loss_mask.shape[1])
        return int(np.diff(self.segments).max())


def collate(
    samples: Sequence[Sample], sample_numbers: Int64Array, documents: DocumentEnds = WITHOUT_ENDS
) -> Batch:
    """b samples of s + 1 tokens -> a micro batch.  A sample's own segments go before its EOD tokens.

    Raises DataError, naming the samples, where they are not of one shape.
    """
    tokens = _stack("tokens", [sample.tokens for sample in samples], sample_numbers)
    inputs = tokens[:, :-1]
    ends = documents.find(inputs)
    loss_mask = np.ones(inputs.shape, dtype=np.float32)
    for row, sample in enumerate(samples):
        if sample.loss_mask is not None:
            loss_mask[row] = sample.loss_mask
    if documents.eod_mask_loss:
        loss_mask[ends] = 0.0
    packed = any(sample.segments is not None for sample in samples)
    positions, segments = None, None
    if documents.reset_position_ids or packed:
        positions = _positions(_begins(samples, ends, documents.reset_position_ids, sample_numbers))
    if documents.reset_attention_mask or packed:
        begins = _begins(samples, ends, documents.reset_attention_mask, sample_numbers)
        segments = np.append(np.flatnonzero(begins), begins.size).astype(np.int32)
    extras = _extras(samples, sample_numbers)
    return Batch(tokens, sample_numbers, loss_mask, positions, segments, extras)


def _begins(
    samples: Sequence[Sample], ends: npt.NDArray[np.bool_], after_ends: bool, numbers: Int64Array
) -> npt.NDArray[np.bool_]:
    """[b, s]: where a segment begins: at each row's start, and by its own list or after its ends."""
    begins = np.zeros_like(ends)
    begins[:, 0] = True
    if after_ends:
        begins[:, 1:] |= ends[:, :-1]
    for row, (sample, number) in enumerate(zip(samples, numbers, strict=True)):
        if sample.segments is not None:
            begins[row] = False
            begins[row, _checked(sample.segments, ends.shape[1], int(number))[:-1]] = True
    return begins


def _checked(segments: Int32Array, length: int, number: int) -> Int32Array:
    rising = len(segments) > 1 and bool((np.diff(segments) > 0).all())
    if not rising or segments[0] != 0 or segments[-1] != length:
        raise DataError(
            f"sample {number}: its segments {segments.tolist()[:8]} are not cumulative lengths: they "
            f"rise from 0 to the {length} tokens of --seq-length - mend the dataset that packs them"
        )
    return segments


def _positions(begins: npt.NDArray[np.bool_]) -> Int64Array:
    """[b, s] beginnings of segments -> positions in them."""
    place = np.arange(begins.shape[1], dtype=np.int64)
    positions: Int64Array = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return positions


def _extras(samples: Sequence[Sample], numbers: Int64Array) -> dict[str, npt.NDArray[Any]]:
    names = samples[0].extras.keys()
    for sample, number in zip(samples, numbers, strict=True):
        if sample.extras.keys() != names:
            raise DataError(
                f"sample {int(number)} has the extras {sorted(sample.extras) or 'none'}, sample "
                f"{int(numbers[0])} {sorted(names) or 'none'}: all samples of a dataset have the same"
            )
    return {
        name: _stack(name, [np.asarray(sample.extras[name]) for sample in samples], numbers)
        for name in names
    }


def _stack(name: str, arrays: Sequence[npt.NDArray[Any]], numbers: Int64Array) -> npt.NDArray[Any]:
    """[b, ...] of b arrays of one shape and number format."""
    first = arrays[0]
    if first.dtype.kind not in _NUMBERS:
        raise DataError(
            f"{name} of sample {int(numbers[0])} are of type {first.dtype}, not numbers"
        )
    for array, number in zip(arrays, numbers, strict=True):
        if (array.shape, array.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{name} of sample {int(number)} are {array.dtype} {list(array.shape)}, of sample "
                f"{int(numbers[0])} {first.dtype} {list(first.shape)}: those of one micro batch are "
                "alike - have the dataset pad or pack them"
            )
    return np.stack(arrays)
