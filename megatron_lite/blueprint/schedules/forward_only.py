"""Forwards alone, for evaluation and inference, whatever the placement."""

from __future__ import annotations

from megatron_lite.blueprint.schedules.actions import Action, Op, Schedule
from megatron_lite.blueprint.stages import Placement


def forward_only_schedule(placement: Placement, num_microbatches: int) -> Schedule:
    """Every stage on every micro batch, in the order of a wave through the pipeline.

    Each rank sorts its work by `stage + microbatch`; an input is always earlier in that order than
    what needs it, so no placement can deadlock.
    """
    lists = []
    for rank in range(max(placement) + 1):
        mine = [stage for stage, holder in enumerate(placement) if holder == rank]
        work = [(s + m, m, s) for s in mine for m in range(num_microbatches)]
        lists.append(tuple(Action(Op.F, stage, m) for _, m, stage in sorted(work)))
    return Schedule(tuple(lists), placement)
