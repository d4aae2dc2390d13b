"""Pipeline schedules as data: generate (compute only) -> lower -> check -> simulate, execute.

Pure Python over blueprint/stages.py; a new schedule is one generator and one line in SCHEDULES.
Begin with actions.py, then one_f_one_b.py and lower.py.
"""

from collections.abc import Callable
from typing import NamedTuple

from megatron_lite.blueprint.schedules.actions import Generator
from megatron_lite.blueprint.schedules.gpipe import gpipe
from megatron_lite.blueprint.schedules.interleaved import interleaved
from megatron_lite.blueprint.schedules.one_f_one_b import one_f_one_b
from megatron_lite.blueprint.schedules.zero_bubble import zb_h1, zb_v
from megatron_lite.blueprint.stages import Placement, folded, round_robin


class ScheduleKind(NamedTuple):
    """place: (pp, chunks per rank) -> placement, known before the number of micro batches is."""

    place: Callable[[int, int], Placement]
    generate: Generator


SCHEDULES = {
    "1f1b": ScheduleKind(round_robin, one_f_one_b),
    "gpipe": ScheduleKind(round_robin, gpipe),
    "interleaved": ScheduleKind(round_robin, interleaved),
    "zb-h1": ScheduleKind(round_robin, zb_h1),
    "zb-v": ScheduleKind(folded, zb_v),
}
"""Value of --pipeline-schedule -> how stages are placed and what each rank does."""
