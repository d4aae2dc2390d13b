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

from operator import itemgetter

from megatron_lite.blueprint.schedules.actions import Action, ActionGroup, Lowered, Op, Schedule
from megatron_lite.blueprint.schedules.simulate import Cost, Span, simulate, unit_cost
from megatron_lite.blueprint.stages import Placement


def lower(schedule: Schedule, cost: Cost = unit_cost) -> Lowered:
    """Each rank's list as groups: one compute action, one REDUCE, or one batch of messages.

    Neighbouring stages on one rank hand over locally and exchange no messages.  Every rank must
    lower with the same costs: they decide the order in which two ranks exchange their messages.
    Time is linear in the number of actions but for sorting the messages of a rank, which come
    almost in order.
    """
    spans = simulate(schedule, cost).spans
    meeting = _meeting(schedule.placement, spans)
    return tuple(_interleave(row, meeting[rank]) for rank, row in enumerate(spans))


def _meeting(
    placement: Placement, spans: tuple[tuple[Span, ...], ...]
) -> list[dict[int, list[Action]]]:
    """Per rank: the messages before compute i, the send of the compute before it first."""
    last = len(placement) - 1
    meeting: list[dict[int, list[Action]]] = [{} for _ in spans]
    arrivals: list[list[tuple[float, Action]]] = [[] for _ in spans]
    for rank, row in enumerate(spans):
        after = meeting[rank]
        for i, (_, end, (op, stage, m)) in enumerate(row, start=1):
            if op is Op.F:
                if stage == last or placement[stage + 1] == rank:
                    continue
                after[i] = [Action(Op.SEND_F, stage, m)]
                arrivals[placement[stage + 1]].append((end, Action(Op.RECV_F, stage + 1, m)))
            elif op is not Op.W:  # B and I make the gradient of the input; what W makes stays here
                if stage == 0 or placement[stage - 1] == rank:
                    continue
                after[i] = [Action(Op.SEND_B, stage, m)]
                arrivals[placement[stage - 1]].append((end, Action(Op.RECV_B, stage - 1, m)))
    for rank, arriving in enumerate(arrivals):
        # stable: messages of one sender keep its order, as NCCL matches them without tags
        arriving.sort(key=itemgetter(0))
        before, starts, i = meeting[rank], [span.start for span in spans[rank]], 0
        for end, action in arriving:
            # the first compute that starts no earlier than the value exists: all before it start
            # earlier than the sender's batch, which the proof above needs
            while i < len(starts) and starts[i] < end:
                i += 1
            before.setdefault(i, []).append(action)
    return meeting


def _interleave(row: tuple[Span, ...], meeting: dict[int, list[Action]]) -> tuple[ActionGroup, ...]:
    reduce_at = _last_backwards(row)
    groups: list[ActionGroup] = []
    for i, (_, _, action) in enumerate(row):
        if i in meeting:
            groups.append(tuple(meeting[i]))
        if i in reduce_at:
            groups.append((Action(Op.REDUCE, action.stage, action.microbatch),))
        groups.append((action,))
    if len(row) in meeting:
        groups.append(tuple(meeting[len(row)]))
    return tuple(groups)


def _last_backwards(row: tuple[Span, ...]) -> set[int]:
    """Where each stage completes its weight gradients for the last time."""
    last: dict[int, int] = {}
    for i, (_, _, (op, stage, _)) in enumerate(row):
        if op is Op.B or op is Op.W:  # an I leaves the products of its weights to a later W
            last[stage] = i
    return set(last.values())
