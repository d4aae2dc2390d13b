"""Adds sends, receives and gradient reductions to a compute-only schedule, once for all of them.

A send follows its compute.  A receive is posted where the *sender's* virtual clock says that the
value exists: on the receiver before the first compute that starts no earlier.  What meets between
two computes is one batch.

Why this never deadlocks, even if a send blocks until its receive is posted: give the batch before
compute j the time `start of j`.  If a rank is stuck in a batch at time t because its partner has
not reached the twin, the partner is stuck in an earlier batch, whose time is at most the start of
the compute before the twin, and that is less than t because every compute takes time.  So times
fall strictly along the chain of waiting ranks and no cycle closes.  Receives placed at their use
instead deadlock every schedule with blocking sends.
"""

from __future__ import annotations

from bisect import bisect_left

from megatron_lite.blueprint.schedules.actions import Action, Group, Lowered, Op, Schedule
from megatron_lite.blueprint.schedules.simulate import Cost, Span, simulate, unit_cost


def lower(schedule: Schedule, cost: Cost = unit_cost) -> Lowered:
    """Each rank's list as groups: one compute action, one REDUCE, or one batch of messages.

    Neighbouring stages on one rank hand over locally and exchange no messages.  Time is linear in
    the number of actions but for a logarithm per message.
    """
    spans = simulate(schedule, cost).spans
    sends, receives = _messages(schedule, spans)
    return tuple(_interleave(row, sends[rank], receives[rank]) for rank, row in enumerate(spans))


def _message(action: Action, last_stage: int) -> tuple[Action, Action] | None:
    """The send that follows a compute and its receive, if a neighbouring stage waits for it."""
    op, stage, m = action
    if op is Op.F and stage < last_stage:
        return Action(Op.SEND_F, stage, m), Action(Op.RECV_F, stage + 1, m)
    if (op is Op.B or op is Op.I) and stage > 0:
        return Action(Op.SEND_B, stage, m), Action(Op.RECV_B, stage - 1, m)
    return None


def _messages(
    schedule: Schedule, spans: tuple[tuple[Span, ...], ...]
) -> tuple[list[dict[int, Action]], list[dict[int, list[Action]]]]:
    """Per rank: the send after compute i; the receives before compute j, by the sender's time."""
    placement = schedule.placement
    starts = [[span.start for span in row] for row in spans]
    sends: list[dict[int, Action]] = [{} for _ in spans]
    arrivals: list[list[tuple[float, Action]]] = [[] for _ in spans]
    for rank, row in enumerate(spans):
        for i, span in enumerate(row):
            pair = _message(span.action, len(placement) - 1)
            if pair is None or placement[pair[1].stage] == rank:
                continue
            sends[rank][i] = pair[0]
            arrivals[placement[pair[1].stage]].append((span.end, pair[1]))
    receives: list[dict[int, list[Action]]] = [{} for _ in spans]
    for rank, arriving in enumerate(arrivals):
        # stable: messages of one sender keep its order, as NCCL matches them without tags
        arriving.sort(key=lambda arrival: arrival[0])
        for end, action in arriving:
            receives[rank].setdefault(bisect_left(starts[rank], end), []).append(action)
    return sends, receives


def _interleave(
    row: tuple[Span, ...], sends: dict[int, Action], receives: dict[int, list[Action]]
) -> tuple[Group, ...]:
    reduce_at = _last_backwards(row)
    groups: list[Group] = []
    for i in range(len(row) + 1):
        batch = ([sends[i - 1]] if i - 1 in sends else []) + receives.get(i, [])
        if batch:
            groups.append(tuple(batch))
        if i in reduce_at:
            groups.append((Action(Op.REDUCE, *row[i].action[1:]),))
        if i < len(row):
            groups.append((row[i].action,))
    return tuple(groups)


def _last_backwards(row: tuple[Span, ...]) -> set[int]:
    """Where each stage completes its weight gradients for the last time."""
    last = {
        span.action.stage: i
        for i, span in enumerate(row)
        if span.action.op is Op.B or span.action.op is Op.W
    }
    return set(last.values())
