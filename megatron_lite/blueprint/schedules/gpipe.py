"""GPipe (arXiv:1811.06965): all forwards, then all backwards."""

from __future__ import annotations

from megatron_lite.blueprint.schedules.actions import Action, Op, Schedule, ScheduleError
from megatron_lite.blueprint.stages import Placement, round_robin


def gpipe(placement: Placement, num_microbatches: int) -> Schedule:
    """1F1B's bubble, but every rank keeps all micro batches; for comparison and for debugging.

    placement: one stage per rank, in order.
    """
    pp = len(placement)
    if placement != round_robin(pp):
        raise ScheduleError(f"gpipe has one stage per rank in order, not {placement}")
    lists = tuple(
        tuple(Action(op, rank, m) for op in (Op.F, Op.B) for m in range(num_microbatches))
        for rank in range(pp)
    )
    return Schedule(lists, placement)
