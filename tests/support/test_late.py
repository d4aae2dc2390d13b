"""The instrument itself: what it lets pass, and each thing that it calls a fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_lite.parallel.collectives import (
    all_reduce,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_lite.parallel.context import Axis, ParallelContext
from tests.support.late import Fault, Late
from tests.support.spawn import spawn


def right(dp: Axis, tp: Axis) -> None:
    x = torch.ones(4)
    first, second = start_all_reduce(x, dp), start_all_gather(torch.full((2,), 3.0), dp)
    assert x.tolist() != [2.0] * 4 and second._result.isnan().all()
    assert all_reduce(torch.ones(1), tp).item() == 2.0  # another communicator is free
    assert second.wait().tolist() == [3.0] * 4
    assert x.tolist() == [2.0] * 4  # begun earlier on the same communicator: it has arrived
    assert first.wait() is x
    assert all_reduce(torch.ones(1), dp).item() == 2.0
    numbers = torch.arange(4)
    assert start_reduce_scatter(numbers, dp).wait().tolist() == [[0, 2], [4, 6]][dp.rank]


def blocking_behind(dp: Axis, tp: Axis) -> None:
    flying = start_all_gather(torch.ones(2), dp)
    all_reduce(torch.ones(1), dp)
    flying.wait()


def source_changed(dp: Axis, tp: Axis) -> None:
    x = torch.ones(2)
    flying = start_all_gather(x, dp)
    x[1] = 0.0
    flying.wait()


def source_freed(dp: Axis, tp: Axis) -> None:
    x = torch.ones(2)
    flying = start_all_gather(x, dp)
    x.untyped_storage().resize_(0)
    flying.wait()


def result_written(dp: Axis, tp: Axis) -> None:
    x = torch.ones(2)
    flying = start_all_reduce(x, dp)
    x += 1.0
    flying.wait()


def nobody_waits(dp: Axis, tp: Axis) -> None:
    start_all_gather(torch.ones(2), dp)


FAULTS: dict[Callable[[Axis, Axis], None], str] = {
    blocking_behind: "all-reduce over dp, in a test, blocks behind 1 in flight there: all-gather",
    source_changed: "the source of all-gather over dp, begun in a test, was changed before a test waited",
    source_freed: "the source of all-gather over dp, begun in a test, was changed before a test waited",
    result_written: "the result of all-reduce over dp, begun in a test, was written to before a test",
    nobody_waits: "all-gather over dp, begun in a test: never waited for",
}


def told(rank: int, ranks: int) -> list[str]:
    """What each of them is told on this rank."""
    groups = {name: dist.new_group([0, 1]) for name in ("dp", "tp")}
    axes = {name: Axis(name, rank, 2, (0, 1), group) for name, group in groups.items()}
    ctx = ParallelContext(torch.device("cpu"), rank, 2, **axes)
    found = []
    for do in (right, *FAULTS):
        try:
            with Late(ctx).everywhere():
                do(ctx.dp, ctx.tp)
            found.append("")
        except Fault as fault:
            found.append(str(fault))
    late = Late(ctx, blocking_behind=True)
    with late.everywhere():
        blocking_behind(ctx.dp, ctx.tp)
    assert late.in_flight("all-gather", "dp") == [1, 0]
    return found


@pytest.fixture(scope="module")
def both() -> list[list[str]]:
    return spawn(told, 2)


def test_what_is_right_passes(both: list[list[str]]) -> None:
    assert [rank[0] for rank in both] == ["", ""]


@pytest.mark.parametrize("place", range(len(FAULTS)), ids=[do.__name__ for do in FAULTS])
def test_a_fault_is_told_on_every_rank(both: list[list[str]], place: int) -> None:
    said = list(FAULTS.values())[place]
    for rank in both:
        assert rank[1 + place].startswith(said), rank[1 + place]
