"""Schedules against torch's generators, the bubble formula, and a proof by exhaustion of lowering."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import (
    MESSAGES,
    Action,
    ActionGroup,
    Lowered,
    Op,
    Schedule,
    ScheduleError,
)
from megatron_lite.blueprint.schedules.check import check_schedule, matching_end
from megatron_lite.blueprint.schedules.forward_only import forward_only_schedule
from megatron_lite.blueprint.schedules.lower import lower
from megatron_lite.blueprint.schedules.one_f_one_b import one_f_one_b
from megatron_lite.blueprint.schedules.simulate import Cost, simulate, unit_cost
from megatron_lite.blueprint.stages import Placement, round_robin

COSTS: dict[str, Cost] = {
    "backward twice a forward": unit_cost,
    "all alike": lambda action: 1.0,
    "later stages slower, nothing a round number": lambda action: (
        (0.1 + 0.7 * (action.op is Op.B)) * (1 + action.stage / 3)
    ),
}


def layouts(pp: int) -> Iterator[tuple[str, Placement]]:
    """Every schedule on pp ranks, interleaved with 2 to 4 chunks."""
    chunks = {"interleaved": (2, 3, 4), "zb-v": (2,)}
    for name, kind in SCHEDULES.items():
        for count in chunks.get(name, (1,)):
            yield name, kind.place(pp, count)


def text(row: Sequence[ActionGroup]) -> str:
    return " | ".join(" ".join(map(str, group)) for group in row)


def pipeline(pp: int, num_microbatches: int) -> Schedule:
    return one_f_one_b(round_robin(pp), num_microbatches)


def test_one_rank_alternates_and_arms_before_the_last_backward() -> None:
    (row,) = lower(pipeline(1, 3))
    assert text(row) == "0F0 | 0B0 | 0F1 | 0B1 | 0F2 | 0REDUCE_GRAD2 | 0B2"


def test_lowered_1f1b_of_two_ranks_by_hand() -> None:
    first, second = lower(pipeline(2, 2))
    assert text(first) == (
        "0F0 | 0SEND_F0 | 0F1 | 0SEND_F1 0RECV_B0 | 0B0 | 0RECV_B1 | 0REDUCE_GRAD1 | 0B1"
    )
    assert text(second) == (
        "1RECV_F0 | 1F0 | 1RECV_F1 | 1B0 | 1SEND_B0 | 1F1 | 1REDUCE_GRAD1 | 1B1 | 1SEND_B1"
    )


@pytest.mark.parametrize(("pp", "m"), [(2, 2), (2, 5), (4, 4), (4, 9), (8, 8), (8, 24)])
def test_1f1b_is_torchs_order(pp: int, m: int) -> None:
    from torch.distributed.pipelining.schedules import Schedule1F1B

    theirs: Any = Schedule1F1B.__new__(Schedule1F1B)
    theirs._num_stages, theirs._n_microbatches = pp, m
    order = theirs._get_pipeline_order()
    for rank, row in enumerate(pipeline(pp, m).lists):
        expected = [str(a) for a in order[rank] if a is not None and "REDUCE" not in str(a)]
        if rank == pp - 1:  # torch counts this rank's forwards from 1 (2.13); their order is plain
            expected = [a for n in range(m) for a in (f"{rank}F{n}", f"{rank}B{n}")]
            assert len(expected) == sum(a is not None for a in order[rank]) - 1
        assert list(map(str, row)) == expected


def test_the_text_form_is_torchs_and_can_be_read_back() -> None:
    from torch.distributed.pipelining.schedules import _Action

    for op in Op:
        written = str(Action(op, 12, 345))
        assert Action.parse(written) == Action(op, 12, 345)
        assert str(_Action.from_str(written)) == written
    with pytest.raises(ScheduleError, match="'2X0' is not an action"):
        Action.parse("2X0")


@pytest.mark.parametrize("pp", range(1, 9))
@pytest.mark.parametrize("factor", [1, 2, 5])
def test_1f1b_bubble_and_memory_are_the_papers(pp: int, factor: int) -> None:
    m = factor * pp
    result = simulate(pipeline(pp, m))
    assert result.bubble == pytest.approx((pp - 1) / (m + pp - 1), abs=1e-12)
    assert result.peak_live == tuple(min(pp - rank, m) for rank in range(pp))


def test_the_users_run_idles_less_than_half_a_percent() -> None:
    assert simulate(pipeline(8, 1536)).bubble == pytest.approx(7 / 1543, abs=1e-12)


def test_fewer_micro_batches_than_stages_still_work() -> None:
    result = simulate(pipeline(8, 3))
    assert result.bubble == pytest.approx(7 / 10, abs=1e-12)
    assert result.peak_live == (3, 3, 3, 3, 3, 3, 2, 1)


def test_forward_only_keeps_nothing_and_fills_the_pipeline() -> None:
    result = simulate(forward_only_schedule(round_robin(4), 10))
    assert result.makespan == 13
    assert result.peak_live == (0, 0, 0, 0)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize("pp", range(1, 9))
def test_lowered_schedules_are_sound(pp: int, cost: Cost) -> None:
    for name, placement in layouts(pp):
        for m in (1, 2, pp, 2 * pp - 2, 2 * pp - 1, 2 * pp, 2 * pp + 1, 4 * pp):
            if m == 0 or (name == "interleaved" and m % pp):
                continue
            check_schedule(lower(SCHEDULES[name].generate(placement, m), cost), placement, m)
            evaluation = lower(forward_only_schedule(placement, m), cost)
            check_schedule(evaluation, placement, m)
            assert not [a for row in evaluation for g in row for a in g if a.op is Op.REDUCE]


@pytest.mark.parametrize("placement", [(0, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (0, 1, 2, 2, 1, 0)])
def test_stages_on_one_rank_hand_over_without_messages(placement: Placement) -> None:
    lowered = lower(forward_only_schedule(placement, 4))
    check_schedule(lowered, placement, 4)
    messages = [a for row in lowered for group in row for a in group if a.op in MESSAGES]
    crossings = sum(a != b for a, b in zip(placement, placement[1:], strict=False))
    assert len(messages) == 2 * 4 * crossings
    assert all(placement[a.stage] != placement[matching_end(a).stage] for a in messages)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(1, 5), st.randoms(), st.data()
)
def test_lowering_any_schedule_never_deadlocks(
    holders: list[int], m: int, rng: random.Random, data: st.DataObject
) -> None:
    used = sorted(set(holders))
    placement = tuple(used.index(holder) for holder in holders)
    split = data.draw(st.lists(st.booleans(), min_size=len(holders), max_size=len(holders)))
    schedule = any_schedule(placement, m, split, rng)
    times = {a: rng.choice([0.1, 0.3, 1.0, 2.5]) for row in schedule.lists for a in row}
    check_schedule(lower(schedule, times.__getitem__), placement, m)


def any_schedule(
    placement: Placement, m: int, split: Sequence[bool], rng: random.Random
) -> Schedule:
    """A random order that respects what needs what; stages with split run I and W instead of B."""
    last = len(placement) - 1
    back = [Op.I if divided else Op.B for divided in split]
    needs: dict[Action, list[Action]] = {}
    for stage in range(last + 1):
        for n in range(m):
            forward, backward = Action(Op.F, stage, n), Action(back[stage], stage, n)
            needs[forward] = [Action(Op.F, stage - 1, n)] if stage else []
            needs[backward] = [forward]
            if stage < last:
                needs[backward].append(Action(back[stage + 1], stage + 1, n))
            if split[stage]:
                needs[Action(Op.W, stage, n)] = [backward]
    lists: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    done: set[Action] = set()
    while len(done) < len(needs):
        free = [a for a, wanted in needs.items() if a not in done and done.issuperset(wanted)]
        action = rng.choice(free)
        done.add(action)
        lists[placement[action.stage]].append(action)
    return Schedule(tuple(map(tuple, lists)), placement)


def receives_at_use(schedule: Schedule) -> Lowered:
    """The lowering that comes to mind first: a receive just before the compute that needs it."""
    last = len(schedule.placement) - 1
    rows = []
    for row in schedule.lists:
        groups: list[ActionGroup] = []
        for op, stage, m in row:
            forward = op is Op.F
            if stage > 0 if forward else stage < last:
                groups.append((Action(Op.RECV_F if forward else Op.RECV_B, stage, m),))
            groups.append((Action(op, stage, m),))
            if stage < last if forward else stage > 0:
                groups.append((Action(Op.SEND_F if forward else Op.SEND_B, stage, m),))
        rows.append(tuple(groups))
    return tuple(rows)


def test_receives_placed_at_their_use_are_found_to_deadlock() -> None:
    lowered = tuple(
        tuple(g for row_g in arm(row) for g in row_g) for row in receives_at_use(pipeline(4, 8))
    )
    with pytest.raises(ScheduleError, match="deadlock with blocking sends"):
        check_schedule(lowered, round_robin(4), 8)


def arm(row: Sequence[ActionGroup]) -> list[list[ActionGroup]]:
    """Each group, the last backward with its REDUCE before it."""
    last = max(i for i, group in enumerate(row) if group[0].op is Op.B)
    reduce = Action(Op.REDUCE, *row[last][0][1:])
    return [[(reduce,), group] if i == last else [group] for i, group in enumerate(row)]


def rows_of(lowered: Lowered) -> list[list[ActionGroup]]:
    return [list(row) for row in lowered]


def without(op: str) -> Callable[[list[list[ActionGroup]]], None]:
    def change(rows: list[list[ActionGroup]]) -> None:
        for row in rows:
            row[:] = [g for g in (tuple(a for a in g if str(a) != op) for g in row) if g]

    return change


def twice(op: str) -> Callable[[list[list[ActionGroup]]], None]:
    def change(rows: list[list[ActionGroup]]) -> None:
        for row in rows:
            row[:] = [again for g in row for again in ([g, g] if str(g[0]) == op else [g])]

    return change


def swapped(first: str, second: str) -> Callable[[list[list[ActionGroup]]], None]:
    def change(rows: list[list[ActionGroup]]) -> None:
        a, b = Action.parse(first), Action.parse(second)
        to = {a: b, b: a}
        for row in rows:
            row[:] = [tuple(to.get(action, action) for action in g) for g in row]

    return change


def moved_to_another_rank(rows: list[list[ActionGroup]]) -> None:
    rows[0], rows[1] = rows[1], rows[0]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (without("0B1"), "stage 0 is not run once per micro batch"),
        (without("1F3"), "stage 1 is not run once per micro batch"),
        (twice("1F2"), "1F2 happens 2 times"),
        (without("0REDUCE_GRAD3"), r"stages \[0\] never reduce"),
        (swapped("0B3", "0B2"), "0B3 before it has 0RECV_B3"),
        (swapped("1F1", "1F2"), "1F2 before it has 1RECV_F2"),
        (swapped("1REDUCE_GRAD3", "1B2"), "1REDUCE_GRAD3 does not come just before"),
        (without("1RECV_F0"), "1F0 before it has 1RECV_F0"),
        (swapped("0SEND_F0", "0SEND_F1"), "0SEND_F1 before it has 0F1"),
        (without("0SEND_F3"), "deadlock with blocking sends"),
        (moved_to_another_rank, "its stage is not"),
    ],
)
def test_check_finds_a_broken_list(
    fault: Callable[[list[list[ActionGroup]]], None], says: str
) -> None:
    rows = rows_of(lower(pipeline(2, 4)))
    fault(rows)
    with pytest.raises(ScheduleError, match=says):
        check_schedule(tuple(map(tuple, rows)), round_robin(2), 4)


def test_check_finds_messages_in_another_order() -> None:
    # both receives in one batch, but the other way round: no deadlock, yet NCCL would mix them up
    f, b, r = (lambda m, op=op: Action(op, 1, m) for op in (Op.F, Op.B, Op.RECV_F))
    first = (
        *((Action(Op.F, 0, m),) for m in (0, 1)),
        (Action(Op.SEND_F, 0, 0), Action(Op.SEND_F, 0, 1)),
    )
    second = ((r(1), r(0)), (f(0),), (f(1),))
    with pytest.raises(ScheduleError, match=r"ranks \(0, 1\) disagree on the order"):
        check_schedule((first, second), round_robin(2), 2)
    check_schedule((first, ((r(0), r(1)), (f(0),), (f(1),))), round_robin(2), 2)


def test_a_schedule_that_cannot_go_on_names_where_each_rank_waits() -> None:
    schedule = pipeline(2, 2)
    backwards = Schedule((schedule.lists[0][::-1], schedule.lists[1]), schedule.placement)
    with pytest.raises(ScheduleError, match=r"\{0: '0B1', 1: '1F0'\}"):
        simulate(backwards)


def test_1f1b_refuses_a_placement_it_does_not_know() -> None:
    with pytest.raises(ScheduleError, match="one stage per rank in order"):
        one_f_one_b((0, 1, 1, 0), 4)


def lines_executed(work: Callable[[], object]) -> int:
    """Python lines run inside the package: a measure of work that no busy machine disturbs."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if "blueprint" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("name", "chunks"), [("1f1b", 1), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2)]
)
def test_generating_lowering_and_checking_is_linear_in_micro_batches(
    name: str, chunks: int
) -> None:
    kind = SCHEDULES[name]
    placement = kind.place(4, chunks)

    def work(m: int) -> Callable[[], None]:
        return lambda: check_schedule(lower(kind.generate(placement, m)), placement, m)

    small, large = lines_executed(work(20)), lines_executed(work(80))
    assert small > 1000
    assert large < 4.1 * small
