"""Pipeline schedules as data: generate (compute only) -> lower -> check -> simulate, execute.

Pure Python over blueprint/stages.py; a new schedule is one generator and one line in SCHEDULES.
Begin with actions.py, then one_f_one_b.py and lower.py.
"""

from collections.abc import Callable
from typing import NamedTuple

from megatron_lite.blueprint.schedules.actions import Generator
from megatron_lite.blueprint.schedules.one_f_one_b import one_f_one_b
from megatron_lite.blueprint.stages import Placement, round_robin


class ScheduleKind(NamedTuple):
    """place: (pp, chunks per rank) -> placement, known before the number of micro batches is."""

    place: Callable[[int, int], Placement]
    generate: Generator


SCHEDULES = {
    "1f1b": ScheduleKind(round_robin, one_f_one_b),
}
"""Value of --pipeline-schedule -> how stages are placed and what each rank does."""
