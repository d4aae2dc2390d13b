"""The launcher itself: results in order, failures named, hangs ended."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import RankFailed, spawn


def add_ranks(rank: int, ranks: int) -> tuple[int, float]:
    x = torch.tensor([float(rank + 1)])
    dist.all_reduce(x)
    return rank, x.item()


def fail_on_one(rank: int, ranks: int) -> None:
    if rank == 1:
        raise ValueError("rank one gives up")
    dist.barrier()


def sleep_on_one(rank: int, ranks: int) -> None:
    time.sleep(30 * rank)


def test_every_rank_answers_in_order() -> None:
    assert spawn(add_ranks, 3) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(RankFailed) as caught:
        spawn(fail_on_one, 2)
    assert "rank one gives up" in caught.value.errors[1]


def test_a_hanging_rank_is_named_and_killed() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        spawn(sleep_on_one, 2, deadline=3.0)
