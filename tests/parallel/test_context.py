"""Pipeline neighbours meet before the first step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_lite.parallel.context import Axis, connect_neighbours
from tests.support.spawn import spawn


def check(rank: int, ranks: int) -> list[tuple[str, int]]:
    calls: list[tuple[str, int]] = []
    post = dist.batch_isend_irecv

    def noting(operations):
        calls.extend((op.op.__name__, op.peer) for op in operations)
        return post(operations)

    dist.batch_isend_irecv = noting
    pp = Axis("pp", rank, ranks, tuple(range(ranks)), dist.group.WORLD)
    connect_neighbours(pp, torch.device("cpu"))
    return calls


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_pair_of_neighbours_has_exchanged_a_number_both_ways(ranks: int) -> None:
    for rank, calls in enumerate(spawn(check, ranks)):
        peers = {(rank + 1) % ranks, (rank - 1) % ranks}
        assert sorted(calls) == sorted((way, p) for way in ("isend", "irecv") for p in peers)
