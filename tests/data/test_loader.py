"""A global batch is the same samples whatever the layout; threads change nothing but the time."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.errors import DataError
from megatron_lite.data.batch import collate
from megatron_lite.data.documents import DocumentEnds
from megatron_lite.data.loader import Loader
from megatron_lite.data.sampler import Order, sample_numbers
from megatron_lite.data.samples import Sample
from megatron_lite.train.feed import permutation


class Counting:
    """Sample i is i, i + 1, ..., i + 4; sample `bad` cannot be read."""

    name = "counting"

    def __init__(self, size: int = 1000, bad: int | None = None) -> None:
        self.size, self.bad = size, bad
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, sample: int) -> Any:
        self.threads.add(threading.get_ident())
        if sample == self.bad:
            raise DataError(f"counting: sample {sample} is bad")
        return Sample(np.arange(sample, sample + 5, dtype=np.int64))


@given(
    consumed=st.integers(0, 10**12),
    micro=st.integers(1, 5),
    dp=st.integers(1, 6),
    num=st.integers(1, 5),
)
def test_the_ranks_together_read_the_global_batch_once(
    consumed: int, micro: int, dp: int, num: int
) -> None:
    size = micro * dp * num
    ranks = [sample_numbers(consumed, micro, num, rank, dp) for rank in range(dp)]
    assert all(numbers.shape == (num, micro) for numbers in ranks)
    assert sorted(np.concatenate(ranks, axis=None).tolist()) == list(
        range(consumed, consumed + size)
    )


def test_ranks_take_turns_as_megatrons_do() -> None:
    assert sample_numbers(100, 2, 2, 1, 3).tolist() == [[102, 103], [108, 109]]


def test_resuming_anywhere_reads_what_was_next() -> None:
    loader = Loader(Counting(), dp_rank=1, dp_size=2, num_workers=2)
    whole = [loader.next_batches(c, 2, 2) for c in range(0, 80, 8)]
    loader.close()
    again = Loader(Counting(), dp_rank=1, dp_size=2, num_workers=0)
    for step in (3, 9, 0):
        for ours, other in zip(again.next_batches(step * 8, 2, 2), whole[step], strict=True):
            assert np.array_equal(ours.tokens, other.tokens)
            assert np.array_equal(ours.sample_numbers, other.sample_numbers)
            assert np.array_equal(ours.loss_mask, other.loss_mask)
    assert whole[3][1].sample_numbers.tolist() == [24 + 6, 24 + 7]
    assert whole[3][1].tokens[0].tolist() == [30, 31, 32, 33, 34]


def test_a_changing_batch_size_is_read_right() -> None:
    loader = Loader(Counting(), dp_rank=0, dp_size=1, num_workers=1)
    consumed = 0
    for size in (4, 4, 8, 8, 12, 4):
        batches = loader.next_batches(consumed, 2, size // 2)
        numbers = [int(n) for batch in batches for n in batch.sample_numbers]
        assert numbers == list(range(consumed, consumed + size))
        consumed += size
    loader.close()


def test_threads_read_ahead_and_waiting_is_measured() -> None:
    dataset = Counting()
    loader = Loader(dataset, dp_rank=0, dp_size=1, num_workers=2)
    loader.next_batches(0, 2, 4)
    loader.next_batches(8, 2, 4)
    loader.close()
    assert threading.get_ident() not in dataset.threads
    assert loader.seconds_waited > 0
    inline = Loader(dataset, dp_rank=0, dp_size=1, num_workers=0)
    inline.next_batches(0, 2, 4)
    assert threading.get_ident() in dataset.threads and inline.seconds_waited > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_surfaces_in_the_step_it_belongs_to(num_workers: int) -> None:
    loader = Loader(Counting(bad=10), dp_rank=0, dp_size=1, num_workers=num_workers)
    assert len(loader.next_batches(0, 4, 2)) == 2
    with pytest.raises(DataError, match="sample 10 is bad"):
        loader.next_batches(8, 4, 2)
    loader.close()


def test_the_end_of_the_data_is_said_in_words() -> None:
    loader = Loader(Counting(20), dp_rank=0, dp_size=1, num_workers=2)
    assert len(loader.next_batches(8, 4, 2)) == 2
    with pytest.raises(DataError, match="no samples left: position 23 of 20"):
        loader.next_batches(16, 4, 2)
    loader.close()


def cyclic(size: int, dp: int = 1, **how: bool) -> Order:
    return Order("cyclic", size, "d", dp_size=dp, permute=permutation, **how)


def reads(order: Order, rank: int, micro: int, dp: int, batches: int) -> list[int]:
    """What a rank reads in so many global batches of one micro batch each."""
    numbers = sample_numbers(0, micro, batches, rank, dp)
    return [int(n) for row in numbers for n in order(row, micro)]


def test_cyclic_is_megatrons_order() -> None:
    """Its sampler: torch.randperm seeded with the epoch, of each rank's part or of all in turn."""
    order = cyclic(64, 2)
    assert reads(order, 0, 2, 2, 1) == [12, 31] and reads(order, 1, 2, 2, 1) == [44, 63]
    for size, micro, dp in ((64, 2, 2), (67, 3, 4), (10, 1, 3), (9, 2, 1)):
        rounds = size // (micro * dp)
        for sharding in (True, False):
            order = cyclic(size, dp, sharding=sharding)
            expected: list[list[int]] = [[] for _ in range(dp)]
            for epoch in (0, 1):
                generator = torch.Generator().manual_seed(epoch)
                part = rounds * micro
                if sharding:
                    drawn = torch.randperm(part, generator=generator).tolist()
                    for rank in range(dp):
                        expected[rank] += [rank * part + n for n in drawn]
                else:
                    drawn = torch.randperm(size // micro * micro, generator=generator).tolist()
                    for rank in range(dp):
                        expected[rank] += drawn[rank::dp][:part]
            for rank in range(dp):
                assert reads(order, rank, micro, dp, 2 * rounds) == expected[rank]


def test_cyclic_needs_one_whole_round() -> None:
    with pytest.raises(DataError, match="5 samples are fewer than --micro-batch-size 2 x"):
        cyclic(5, 3)(np.arange(2), 2)


def test_eod_mask_loss_masks_where_the_input_is_eod() -> None:
    samples = [Sample(np.array(tokens)) for tokens in ([1, 9, 2, 9], [9, 9, 3, 4])]
    numbers = np.array([5, 6])
    batch = collate(samples, numbers, DocumentEnds(eod=9, eod_mask_loss=True))
    assert batch.loss_mask.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert batch.loss_mask.dtype == np.float32 and batch.tokens.dtype == np.int64
    assert collate(samples, numbers).loss_mask.tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_prepares_a_batch_does_so_where_it_is_read(workers: int) -> None:
    threads = set()

    def prepare(batch):
        threads.add(threading.get_ident())
        return dataclasses.replace(batch, tokens=batch.tokens + 1)

    plain = Loader(Counting(), dp_rank=0, dp_size=1, num_workers=0)
    loader = Loader(Counting(), dp_rank=0, dp_size=1, num_workers=workers, prepare=prepare)
    found, expected = (one.next_batches(0, 2, 3) for one in (loader, plain))
    loader.close()
    assert all((a.tokens == b.tokens + 1).all() for a, b in zip(found, expected, strict=True))
    assert (threading.get_ident() in threads) == (workers == 0)
