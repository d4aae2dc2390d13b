"""The order of samples, exactly Megatron's: which documents, where samples begin, how they shuffle.

    document_index   documents, repeated per epoch and shuffled
    sample_index     where in that stream of tokens each sample of S + 1 tokens begins
    shuffle_index    sample numbers in the order of training
    blend            which dataset, and which of its samples, at each step

The shuffles are one numpy RandomState consumed in a fixed order; all counts are integers.
Where the C++ helpers are built they do the walks and the shuffles; the numpy twins give the
same arrays.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_lite.config.blend import MAX_DATASETS
from megatron_lite.data import blending

COMPILED: ModuleType | None
try:
    COMPILED = importlib.import_module("megatron_lite.data._index_helpers")
except ImportError:  # setup.py builds it where there is a compiler
    COMPILED = None

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
IndexArray = npt.NDArray[np.integer[Any]]
_Array = TypeVar("_Array", bound=npt.NDArray[Any])

MOST_SHUFFLED = 1 << 32  # the helper draws 32-bit numbers, as RandomState does up to here


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """How often a split is repeated; `separate_last` shuffles the last epoch apart."""

    epochs: int
    samples: int
    samples_before_last: int
    separate_last: bool


def plan_epochs(tokens_per_epoch: int, seq_length: int, num_samples: int | None) -> EpochPlan:
    """The smallest number of epochs that holds num_samples; None means exactly one epoch.

    A sample has seq_length + 1 tokens, the last of which begins the next sample.
    """
    assert tokens_per_epoch > 0, "a split without tokens has no epochs"
    epochs = 1
    if num_samples is not None:
        epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
    samples = (epochs * tokens_per_epoch - 1) // seq_length
    if epochs == 1 or num_samples is None:
        return EpochPlan(epochs, samples, samples, False)
    before_last = ((epochs - 1) * tokens_per_epoch - 1) // seq_length
    per_epoch = (tokens_per_epoch - 1) // seq_length
    from_last = num_samples - before_last
    assert 0 <= from_last <= per_epoch + 1, (num_samples, before_last, per_epoch)
    # Megatron's threshold, double arithmetic included
    return EpochPlan(epochs, samples, before_last, from_last < int(0.80 * per_epoch))


def document_index(
    documents: Int32Array, plan: EpochPlan, random: np.random.RandomState
) -> Int32Array:
    """documents: numbers of the split -> int32 [epochs * documents], shuffled."""
    if not plan.separate_last:
        return shuffled(np.tile(documents.astype(np.int32), plan.epochs), random)
    first = shuffled(np.tile(documents.astype(np.int32), plan.epochs - 1), random)
    last = shuffled(documents.astype(np.int32), random)
    return np.concatenate((first, last))


def shuffle_index(plan: EpochPlan, random: np.random.RandomState) -> IndexArray:
    """uint32 (int64 if too many) [samples]: the last epoch's samples stay last if separate."""
    dtype: type[np.integer[Any]] = np.uint32
    if plan.samples >= np.iinfo(np.uint32).max - 1:
        dtype = np.int64
    border = plan.samples_before_last if plan.separate_last else plan.samples
    first = shuffled(np.arange(border, dtype=dtype), random)
    if border == plan.samples:
        return first
    return np.concatenate((first, shuffled(np.arange(border, plan.samples, dtype=dtype), random)))


def shuffled(
    values: _Array, random: np.random.RandomState, helpers: ModuleType | None = COMPILED
) -> _Array:
    """The same array, shuffled in place as RandomState.shuffle does; `random` moves on alike."""
    if helpers is None or len(values) >= MOST_SHUFFLED or values.itemsize not in (4, 8):
        random.shuffle(values)
        return values
    state = random.get_state(legacy=False)
    assert isinstance(state, dict) and state["bit_generator"] == "MT19937", state
    inner = state["state"]
    if values.itemsize == 4:
        inner["pos"] = helpers.shuffle_4(values.view(np.uint32), inner["key"], inner["pos"])
    else:
        inner["pos"] = helpers.shuffle_8(values.view(np.uint64), inner["key"], inner["pos"])
    random.set_state(state)
    return values


def sample_index(
    sizes: Int32Array,
    documents: Int32Array,
    seq_length: int,
    num_samples: int,
    helpers: ModuleType | None = COMPILED,
) -> IndexArray:
    """[num_samples + 1, 2]: position in `documents` and token offset where each sample begins.

    sizes: tokens of every document of the file; documents: the document index.  int32 where
    both columns fit, else int64.  helpers=None takes the numpy twin.
    """
    wide = max(len(documents), int(sizes.max(initial=0))) > np.iinfo(np.int32).max
    if helpers is not None:
        walk = helpers.sample_index_int64 if wide else helpers.sample_index_int32
        rows: IndexArray = walk(sizes, documents, seq_length, num_samples)
        return rows
    ends = np.cumsum(sizes[documents], dtype=np.int64)
    starts = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    # right: a start at the end of one document is the first token of the next that has any
    position = np.searchsorted(ends, starts, side="right")
    before = ends[position] - sizes[documents[position]]
    rows = np.stack((position, starts - before), axis=1)
    rows[0] = 0  # Megatron begins at the first entry even if it is an empty document
    return rows.astype(np.int64 if wide else np.int32)


@dataclass(frozen=True, slots=True)
class BlendIndex:
    """At step k: sample[k] of dataset[k]."""

    dataset: npt.NDArray[np.int16]
    sample: Int64Array


def blend_index(
    weights: npt.ArrayLike,
    size: int,
    limits: npt.ArrayLike | None = None,
    helpers: ModuleType | None = COMPILED,
) -> BlendIndex:
    """The dataset furthest behind its share gets the next sample; on a tie the lowest number.

    weights: positive shares that sum to 1; limits: samples a dataset has at most.  IndexError where
    they are fewer than size.
    """
    shares = np.asarray(weights, dtype=np.float64)
    assert 0 < len(shares) <= MAX_DATASETS, len(shares)
    if limits is None:
        most = np.full(len(shares), np.iinfo(np.int64).max)
    else:
        most = np.asarray(limits, dtype=np.int64)
    if helpers is not None:
        return BlendIndex(*helpers.blend(shares.tolist(), most.tolist(), size))
    return BlendIndex(*blending.blend(shares, most, size))


def exhaustive_blend_index(
    sizes: npt.ArrayLike, helpers: ModuleType | None = COMPILED
) -> BlendIndex:
    """Every sample of every dataset once, spread in proportion to the datasets' sizes."""
    counts = np.asarray(sizes, dtype=np.int64)
    total = int(counts.sum())
    return blend_index(counts / float(total), total, counts, helpers)
