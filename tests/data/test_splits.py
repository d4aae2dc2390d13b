"""Splits and blends hold for any shares: every document once, every dataset near its weight."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_lite.config.blend import parse_split
from megatron_lite.data.indices import COMPILED, blend_index
from megatron_lite.data.pretrain import split_ranges

numbers = st.one_of(st.integers(0, 1000), st.decimals(0, 1000, places=3).map(float))
splits = st.lists(numbers, min_size=1, max_size=3).filter(lambda given: sum(given) > 0)


@given(splits, st.sampled_from([",", " ", "/"]))
def test_shares_are_the_numbers_over_their_sum(given: list[float], separator: str) -> None:
    shares = parse_split(separator.join(map(repr, given)))
    exact = [Fraction(repr(n)) for n in given] + [Fraction(0)] * (3 - len(given))
    assert shares == pytest.approx([float(n / sum(exact)) for n in exact], rel=1e-12, abs=0)
    assert sum(shares) == pytest.approx(1.0, rel=1e-12)


@settings(max_examples=300)
@given(splits, st.integers(0, 10**7))
@example([949, 50, 1], 10)
@example([1, 1, 1], 1)
@example([0, 1], 7)
def test_every_document_is_in_one_split_and_their_sizes_are_the_shares(
    given: list[float], documents: int
) -> None:
    total = sum(map(Fraction, given))
    exact = [Fraction(n) / total for n in given] + [Fraction(0)] * (3 - len(given))
    shares = tuple(float(share) for share in exact)
    ranges = split_ranges(shares, documents)
    assert [found is None for found in ranges] == [share == 0.0 for share in shares]
    kept = [found for found in ranges if found is not None]
    # one after the other, from the first document to the last
    assert kept[0].start == 0 and kept[-1].stop == documents
    assert all(a.stop == b.start for a, b in zip(kept, kept[1:], strict=False))
    for found, share in zip(ranges, exact, strict=True):
        if found is not None:
            assert abs((found.stop - found.start) - share * documents) <= 1 + Fraction(1, 1000)


weights_of = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


@pytest.mark.parametrize("helpers", [None, COMPILED], ids=["numpy", "compiled"])
@settings(max_examples=80, deadline=None)
@given(weights=weights_of, size=st.integers(1, 400))
def test_a_blend_takes_each_datasets_samples_in_order_and_keeps_to_its_weights(
    helpers: object, weights: list[int], size: int
) -> None:
    if helpers is None and COMPILED is not None:
        size = min(size, 120)  # the twin is slow
    shares = np.array(weights) / sum(weights)
    index = blend_index(shares, size, helpers=helpers)  # type: ignore[arg-type]
    for number in range(len(weights)):
        mine = index.sample[index.dataset == number]
        assert mine.tolist() == list(range(len(mine))), "its samples 0, 1, 2, ..."
    taken = np.cumsum(np.eye(len(weights))[index.dataset], axis=0)
    wanted = np.arange(1, size + 1)[:, None] * shares
    # only one that is not ahead is chosen, so nobody gets further ahead than by that one sample
    assert (taken - wanted).max() <= 1 + 1e-9
    assert (wanted - taken).max() <= max(len(weights) - 1, 1) + 1e-9


@given(
    weights=st.lists(st.integers(1, 1000), min_size=2, max_size=12, unique=True),
    size=st.integers(2, 60),
)
def test_a_blend_is_the_greedy_choice_in_exact_numbers(weights: list[int], size: int) -> None:
    """The dataset furthest behind its share is chosen, in fractions (ties: the golden arrays)."""
    total, taken, chosen = sum(weights), [0] * len(weights), []
    for k in range(size):
        behind = [Fraction(w * max(k, 1), total) - t for w, t in zip(weights, taken, strict=True)]
        first, second = sorted(behind, reverse=True)[:2]
        if first - second < Fraction(1, 10**9):
            break  # rounding may choose either, and what follows depends on it
        chosen.append(behind.index(first))
        taken[chosen[-1]] += 1
    assert blend_index(np.array(weights) / total, size).dataset.tolist()[: len(chosen)] == chosen
