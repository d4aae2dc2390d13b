"""Interleaved 1F1B (arXiv:2104.04473, figure 4 bottom): several chunks of layers per rank."""

from __future__ import annotations

from megatron_lite.blueprint.schedules.actions import Action, Op, Schedule, ScheduleError
from megatron_lite.blueprint.stages import Placement, round_robin


def interleaved(placement: Placement, num_microbatches: int) -> Schedule:
    """The bubble of 1F1B over the number of chunks v, for v times its messages.

    Micro batches walk through the chunks in groups of pp, hence their number is a multiple of pp.
    Rank 0 keeps pp * v + pp - 1 chunk activations, 1F1B pp * v (chunks being a v-th of a stage).
    placement: chunk c of rank r is stage c * pp + r.
    """
    pp = max(placement) + 1
    chunks = len(placement) // pp
    if chunks < 2 or placement != round_robin(pp, chunks):
        raise ScheduleError(f"interleaved has two or more chunks per rank in turn, not {placement}")
    if num_microbatches % pp:
        raise ScheduleError(
            f"interleaved: {num_microbatches} micro batches are no multiple of {pp}"
        )
    total = num_microbatches * chunks
    order = [_chunk_and_microbatch(i, pp, chunks) for i in range(total)]
    lists = []
    for rank in range(pp):
        forwards = [Action(Op.F, chunk * pp + rank, m) for chunk, m in order]
        backwards = [Action(Op.B, (chunks - 1 - chunk) * pp + rank, m) for chunk, m in order]
        warmup = min(2 * (pp - 1 - rank) + (chunks - 1) * pp, total)
        steady = [a for pair in zip(forwards[warmup:], backwards, strict=False) for a in pair]
        lists.append((*forwards[:warmup], *steady, *backwards[total - warmup :]))
    return Schedule(tuple(lists), placement)


def _chunk_and_microbatch(i: int, pp: int, chunks: int) -> tuple[int, int]:
    """Which chunk runs which micro batch in the i-th forward of a rank."""
    group, within = divmod(i, pp * chunks)
    chunk, lane = divmod(within, pp)
    return chunk, group * pp + lane
