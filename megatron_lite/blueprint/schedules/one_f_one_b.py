"""1F1B, "PipeDream-flush" (arXiv:2104.04473, figure 4 top): warm up, then forward, backward, ..."""

from __future__ import annotations

from megatron_lite.blueprint.schedules.actions import Action, Op, Schedule, ScheduleError
from megatron_lite.blueprint.stages import Placement, round_robin


def one_f_one_b(placement: Placement, num_microbatches: int) -> Schedule:
    """pp rank r keeps at most pp - r micro batches; the bubble is (pp - 1) / (m + pp - 1).

    placement: one stage per rank, in order.
    """
    pp = len(placement)
    if placement != round_robin(pp):
        raise ScheduleError(f"1f1b has one stage per rank in order, not {placement}")
    lists = []
    for rank in range(pp):
        forwards = [Action(Op.F, rank, m) for m in range(num_microbatches)]
        backwards = [Action(Op.B, rank, m) for m in range(num_microbatches)]
        warmup = min(pp - 1 - rank, num_microbatches)
        steady = [a for pair in zip(forwards[warmup:], backwards, strict=False) for a in pair]
        drain = backwards[num_microbatches - warmup :]
        lists.append((*forwards[:warmup], *steady, *drain))
    return Schedule(tuple(lists), placement)
