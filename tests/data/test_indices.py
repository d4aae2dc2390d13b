"""The arrays are Megatron's, by golden values and by megatron-core; C++ and numpy are equal."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data import blending
from megatron_lite.data.indices import (
    COMPILED,
    Int32Array,
    blend_index,
    document_index,
    exhaustive_blend_index,
    plan_epochs,
    sample_index,
    shuffle_index,
    shuffled,
)
from tests.support.extras import needs

needs_compiled = pytest.mark.skipif(
    COMPILED is None, reason="the C++ helpers are not built (python setup.py build_ext --inplace)"
)
HELPERS = [
    pytest.param(None, id="numpy"),
    pytest.param(COMPILED, id="compiled", marks=needs_compiled),
]

SIZES = np.array([5, 3, 9, 1, 7], np.int32)
GOLDEN_DATASETS = [1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0]
GOLDEN_SAMPLES = [0, 0, 1, 1, 2, 3, 2, 4, 5, 3, 6, 7, 4, 8, 9, 5, 10, 11, 6, 12, 7, 13, 14, 8]


def walk(
    sizes: Int32Array, documents: Int32Array, seq_length: int, num_samples: int
) -> list[list[int]]:
    """Token by token: sample k begins at token k * seq_length of the stream."""
    places = [(j, offset) for j, d in enumerate(documents) for offset in range(sizes[d])]
    rows = [list(places[k * seq_length]) for k in range(num_samples + 1)]
    rows[0] = [0, 0]
    return rows


@pytest.mark.parametrize("helpers", HELPERS)
def test_golden_sample_order(helpers: object) -> None:
    plan = plan_epochs(25, 4, 6)
    assert (plan.epochs, plan.samples, plan.separate_last) == (1, 6, False)
    random = np.random.RandomState(1234)
    documents = document_index(np.arange(5, dtype=np.int32), plan, random)
    assert documents.tolist() == [4, 0, 1, 2, 3] and documents.dtype == np.int32
    rows = sample_index(SIZES, documents, 4, plan.samples, helpers)  # type: ignore[arg-type]
    assert rows.tolist() == [[0, 0], [0, 4], [1, 1], [2, 0], [3, 1], [3, 5], [4, 0]]
    assert rows.dtype == np.int32
    shuffle = shuffle_index(plan, random)
    assert shuffle.tolist() == [5, 2, 3, 1, 0, 4] and shuffle.dtype == np.uint32


@pytest.mark.parametrize("helpers", HELPERS)
def test_golden_blend(helpers: object) -> None:
    index = blend_index([0.35, 0.65], 24, helpers=helpers)  # type: ignore[arg-type]
    assert index.dataset.tolist() == GOLDEN_DATASETS and index.dataset.dtype == np.int16
    assert index.sample.tolist() == GOLDEN_SAMPLES and index.sample.dtype == np.int64


@pytest.mark.parametrize("helpers", HELPERS)
@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda s: sum(s) > 1),
    epochs=st.integers(1, 4),
    seq_length=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_sample_index_equals_the_walk(
    helpers: object, sizes: list[int], epochs: int, seq_length: int, seed: int
) -> None:
    lengths = np.array(sizes, np.int32)
    documents = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    np.random.RandomState(seed).shuffle(documents)
    samples = (epochs * sum(sizes) - 1) // seq_length
    rows = sample_index(lengths, documents, seq_length, samples, helpers)  # type: ignore[arg-type]
    assert rows.tolist() == walk(lengths, documents, seq_length, samples)


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(1e-6, 10), min_size=1, max_size=20),
    size=st.integers(0, 300),
    data=st.data(),
)
def test_compiled_blends_equal_numpys(weights: list[float], size: int, data: st.DataObject) -> None:
    shares = np.array(weights) / np.sum(weights)
    ours, twin = blend_index(shares, size), blend_index(shares, size, helpers=None)
    assert ours.dataset.tolist() == twin.dataset.tolist()
    assert ours.sample.tolist() == twin.sample.tolist()
    counts = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    ours, twin = exhaustive_blend_index(counts), exhaustive_blend_index(counts, helpers=None)
    assert ours.dataset.tolist() == twin.dataset.tolist()
    assert ours.sample.tolist() == twin.sample.tolist()
    assert np.bincount(ours.dataset, minlength=len(counts)).tolist() == counts


@needs_compiled
def test_compiled_walks_are_safe_from_wrong_arrays() -> None:
    assert COMPILED is not None
    one = np.zeros(1, np.int32)
    with pytest.raises(IndexError, match="outside the lengths"):
        COMPILED.sample_index_int32(SIZES, one + 5, 1, 1)
    with pytest.raises(IndexError, match="outside the lengths"):
        COMPILED.sample_index_int32(SIZES, one - 1, 1, 1)
    with pytest.raises(IndexError, match="fewer tokens"):
        COMPILED.sample_index_int32(SIZES, one, 1, 5)
    with pytest.raises(ValueError, match="as many"):
        COMPILED.blend([0.5, 0.5], [1], 1)


@needs_compiled
def test_both_widths_hold_the_same_rows() -> None:
    assert COMPILED is not None
    documents = np.array([4, 0, 1, 2, 3], np.int32)
    narrow = COMPILED.sample_index_int32(SIZES, documents, 4, 6)
    wide = COMPILED.sample_index_int64(SIZES, documents, 4, 6)
    assert wide.dtype == np.int64 and narrow.dtype == np.int32
    assert wide.tolist() == narrow.tolist()


@pytest.mark.parametrize("weights", [[0.35, 0.65], [0.7, 0.2, 0.1], [0.9, 0.05, 0.03, 0.02]])
def test_every_prefix_of_a_blend_is_near_its_shares(weights: list[float]) -> None:
    index = blend_index(weights, 2000)
    taken = np.cumsum(np.eye(len(weights))[index.dataset], axis=0)
    wanted = np.arange(1, 2001)[:, None] * np.array(weights)[None, :]
    assert np.abs(taken - wanted).max() <= 2
    assert np.all(blend_index(weights, 500).dataset == index.dataset[:500])


def test_epochs_are_ceilings_of_whole_numbers() -> None:
    assert plan_epochs(25, 4, 6).epochs == 1  # 6 * 4 + 1 = 25 exactly
    assert plan_epochs(24, 4, 6).epochs == 2
    assert plan_epochs(25, 4, None).samples == 6
    assert plan_epochs(25, 4, 0).epochs == 1
    # beyond what a float32 or a double counts exactly
    tokens = 10**17 + 1
    plan = plan_epochs(tokens, 2048, 3 * (tokens // 2048))
    assert plan.samples == (plan.epochs * tokens - 1) // 2048
    assert plan.epochs == 3


def test_a_short_last_epoch_is_shuffled_apart() -> None:
    plan = plan_epochs(100, 4, 30)  # 24 samples per epoch; 6 of 24 from the last
    assert plan.epochs == 2 and plan.separate_last and plan.samples_before_last == 24
    random = np.random.RandomState(7)
    documents = document_index(np.arange(10, dtype=np.int32), plan, random)
    assert sorted(documents[:10]) == sorted(documents[10:]) == list(range(10))
    shuffle = shuffle_index(plan, random)
    assert sorted(shuffle[:24]) == list(range(24))
    assert sorted(shuffle[24:]) == list(range(24, plan.samples))
    assert not plan_epochs(100, 4, 48).separate_last  # 24 of 24


@pytest.mark.parametrize("seed", range(4))
def test_arrays_equal_megatron_cores(seed: int) -> None:
    needs("megatron.core.datasets")
    from megatron.core.datasets import gpt_dataset, helpers

    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 50, 400).astype(np.int32)
    numbers = np.arange(20, 380, dtype=np.int32)
    tokens = int(sizes[numbers].sum())
    seq_length = 17
    for wanted in (5, tokens // seq_length, 2 * tokens // seq_length, 3 * tokens // seq_length + 9):
        plan = plan_epochs(tokens, seq_length, wanted)
        ours, theirs = np.random.RandomState(seed), np.random.RandomState(seed)
        documents = document_index(numbers, plan, ours)
        expected = gpt_dataset._build_document_index(
            numbers, plan.epochs, theirs, plan.separate_last
        )
        assert np.array_equal(documents, expected) and documents.dtype == expected.dtype
        rows = helpers.build_sample_idx(sizes, documents, seq_length, plan.epochs, tokens)
        for twin in {None, COMPILED}:
            found = sample_index(sizes, documents, seq_length, plan.samples, twin)
            assert np.array_equal(found, rows) and found.dtype == rows.dtype
        border = plan.samples_before_last if plan.separate_last else plan.samples
        expected = gpt_dataset._build_shuffle_index(border, plan.samples, theirs)
        shuffle = shuffle_index(plan, ours)
        assert np.array_equal(shuffle, expected) and shuffle.dtype == expected.dtype


@pytest.mark.parametrize("number", [1, 2, 3, 10, 100])
def test_blends_equal_megatron_cores(number: int) -> None:
    needs("megatron.core.datasets")
    from megatron.core.datasets import helpers

    weights = np.random.default_rng(number).random(number) + 1e-3
    shares = weights / weights.sum()
    size = 3000
    dataset, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(dataset, sample, shares.tolist(), number, size, False)
    for twin in {None, COMPILED}:
        found = blend_index(shares, size, helpers=twin)
        assert np.array_equal(found.dataset, dataset) and np.array_equal(found.sample, sample)
    counts = np.random.default_rng(number).integers(1, 60, number)
    dataset, sample = np.zeros(counts.sum(), np.int16), np.zeros(counts.sum(), np.int64)
    helpers.build_exhaustive_blending_indices(dataset, sample, counts.tolist(), number)
    for twin in {None, COMPILED}:
        found = exhaustive_blend_index(counts, helpers=twin)
        assert np.array_equal(found.dataset, dataset) and np.array_equal(found.sample, sample)


@needs_compiled
@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 255, 256, 257, 624, 1000, 70_001])
def test_shuffling_equals_numpys_and_leaves_the_generator_where_numpy_does(
    size: int, dtype: type
) -> None:
    ours, theirs = np.random.RandomState(size), np.random.RandomState(size)
    for _ in range(2):
        mine, other = np.arange(size, dtype=dtype), np.arange(size, dtype=dtype)
        shuffled(mine, ours)
        theirs.shuffle(other)
        assert np.array_equal(mine, other)
    assert ours.randint(0, 1 << 30, 700).tolist() == theirs.randint(0, 1 << 30, 700).tolist()
    assert np.array_equal(
        shuffled(np.arange(size, dtype=dtype), ours, helpers=None),
        shuffled(np.arange(size, dtype=dtype), theirs),
    )


def one_by_one(shares: Sequence[float], size: int, limits: Sequence[int]) -> list[int]:
    """The dataset of every step, as Megatron says it: doubles, the first of equals."""
    taken = [0] * len(shares)
    chosen = []
    for step in range(size):
        behind = [share * max(float(step), 1.0) - float(count) if count < limit else -math.inf
                  for share, count, limit in zip(shares, taken, limits, strict=True)]  # fmt: skip
        chosen.append(behind.index(max(behind)))
        taken[chosen[-1]] += 1
    return chosen


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1.0, 1.0, 2.0, 0.1, 1e-6, 0.3, 7.7]), min_size=1, max_size=9),
    size=st.integers(0, 700),
    block=st.sampled_from([1, 30, 97, 1 << 21]),
    together=st.sampled_from([1, 40, 1 << 15]),
    shortest=st.integers(1, 12),
    data=st.data(),
)
def test_numpys_blend_is_the_one_walk_whatever_was_guessed(
    weights: list[float], size: int, block: int, together: int, shortest: int, data: st.DataObject
) -> None:
    shares = [float(share) for share in np.array(weights) / np.sum(weights)]
    limits = [data.draw(st.integers(0, size)) for _ in weights] if data.draw(st.booleans()) else []
    limits = limits or [size] * len(weights)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_BLOCK", block), ("TOGETHER", together), ("_SHORTEST", shortest)):
            patch.setattr(blending, name, value)
        if data.draw(st.booleans()):  # as wrong as can be
            patch.setattr(
                blending, "guess", lambda s, most, at: np.zeros((len(at), len(s)), np.int64)
            )
        if sum(limits) < size:
            with pytest.raises(IndexError, match="no dataset has samples left"):
                blend_index(shares, size, limits, helpers=None)
            return
        index = blend_index(shares, size, limits, helpers=None)
    assert index.dataset.tolist() == one_by_one(shares, size, limits)
    for dataset in range(len(shares)):
        mine = index.sample[index.dataset == dataset]
        assert mine.tolist() == list(range(len(mine)))


def test_numpys_blend_is_twenty_times_as_fast_as_one_step_at_a_time() -> None:
    shares = [0.35, 0.65]
    began = time.process_time()
    blend_index(shares, 400_000, helpers=None)
    many = (time.process_time() - began) / 400_000
    began = time.process_time()
    taken, behind = np.zeros(2), np.empty(2)
    for step in range(4000):  # the same by numpy, without more than one step at a time
        np.multiply(shares, max(float(step), 1.0), out=behind)
        behind -= taken
        taken[int(behind.argmax())] += 1.0
    one = (time.process_time() - began) / 4000
    assert one / many > 10  # 20 and more where nobody else computes


LONG = 70_000  # above this the helper walks four stretches and joins them
MANY = {
    "two": [0.35, 0.65],
    "nearly one": [1 - 1e-6, 1e-6],
    "ties": [1.0] * 10,
    "powers": [2.0**-i for i in range(14)],
    "as many as registers hold": list(np.random.default_rng(1).random(16)),
    "one more": list(np.random.default_rng(2).random(17)),
    "many ties": [1.0] * 33,
    "many": list(np.random.default_rng(3).random(50) ** 3 + 1e-4),
}


@needs_compiled
@pytest.mark.parametrize("weights", MANY.values(), ids=MANY.keys())
def test_joined_stretches_equal_the_one_walk(weights: list[float]) -> None:
    shares = np.array(weights) / np.sum(weights)
    ours, twin = blend_index(shares, LONG), blend_index(shares, LONG, helpers=None)
    assert np.array_equal(ours.dataset, twin.dataset)
    assert np.array_equal(ours.sample, twin.sample)


@needs_compiled
@pytest.mark.parametrize("weights", [MANY["two"], MANY["ties"], MANY["many"]])
def test_joined_stretches_use_every_dataset_up(weights: list[float]) -> None:
    counts = np.maximum(1, (np.array(weights) / np.sum(weights) * LONG).astype(np.int64))
    ours, twin = exhaustive_blend_index(counts), exhaustive_blend_index(counts, helpers=None)
    assert np.array_equal(ours.dataset, twin.dataset)
    assert np.array_equal(ours.sample, twin.sample)


@needs_compiled
def test_a_limit_in_the_middle_of_a_stretch_is_kept() -> None:
    shares, limits = [0.5, 0.3, 0.2], [10_000, 50_000, 60_000]
    ours = blend_index(shares, LONG, limits)
    twin = blend_index(shares, LONG, limits, helpers=None)
    assert np.array_equal(ours.dataset, twin.dataset)
    assert np.bincount(ours.dataset).max() <= 60_000 and (ours.dataset == 0).sum() == 10_000
    for helpers in (COMPILED, None):
        with pytest.raises(IndexError, match="no dataset has samples left"):
            blend_index(shares, LONG, [10, 20, 30], helpers)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=6))
def test_every_prefix_of_any_blend_is_near_its_shares(weights: list[float]) -> None:
    shares = np.array(weights) / np.sum(weights)
    index = blend_index(shares, 400)
    taken = np.cumsum(np.eye(len(weights))[index.dataset], axis=0)
    off = np.abs(taken - np.arange(1, 401)[:, None] * shares[None, :]).max()
    assert off <= (1.0 + 1e-9 if len(weights) == 2 else 2.0)


@pytest.mark.parametrize("helpers", HELPERS)
def test_token_counts_pass_two_to_the_31(helpers: object) -> None:
    sizes = np.full(6, 2**31 - 1, np.int32)
    documents = np.arange(6, dtype=np.int32)
    seq_length = 2**20 + 3
    samples = (int(sizes.sum(dtype=np.int64)) - 1) // seq_length
    rows = sample_index(sizes, documents, seq_length, samples, helpers)  # type: ignore[arg-type]
    starts = rows[:, 0].astype(np.int64) * (2**31 - 1) + rows[:, 1]
    assert samples > 12_000 and np.array_equal(starts, np.arange(samples + 1) * seq_length)


@needs_compiled
def test_other_threads_run_while_the_helper_works() -> None:
    done = threading.Event()

    def work() -> None:
        blend_index(np.full(100, 0.01), 200_000)
        done.set()

    thread = threading.Thread(target=work)
    turns = 0
    thread.start()
    while not done.is_set():
        turns += 1  # with the lock held this loop would not turn before the blend is done
    thread.join()
    assert turns > 1000
