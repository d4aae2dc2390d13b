"""A schedule in virtual time: when each action runs, how long ranks idle, what they hold.

The one interpreter behind the bubble in the plan, the timeline plot and the placing of receives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from megatron_lite.blueprint.schedules.actions import Action, Op, Schedule, ScheduleError

Cost = Callable[[Action], float]
"""Time an action takes, in any unit; greater than zero."""

_UNIT = {Op.F: 1.0, Op.B: 2.0, Op.I: 1.0, Op.W: 1.0}


def unit_cost(action: Action) -> float:
    """A whole backward takes twice a forward: two matrix products for one."""
    return _UNIT[action.op]


class Span(NamedTuple):
    """An action's time."""

    start: float
    end: float
    action: Action


class Simulation(NamedTuple):
    """What came out.

    bubble: idle share of the rank that idles most.  peak_live: per rank, micro batches (of one
    stage) that wait for their backward at the worst moment; 0 where nothing is kept (forward only).
    """

    makespan: float
    bubble: float
    peak_live: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]


_Value = tuple[bool, int, int]
"""What an action makes available: (is forward, stage, micro batch)."""


class _Run:
    """State of a simulation; linear in actions, since a rank sleeps until its input is there."""

    def __init__(self, schedule: Schedule, cost: Cost, latency: float) -> None:
        self.lists, self.cost, self.latency = schedule.lists, cost, latency
        self.placement = schedule.placement
        self.last_stage = len(schedule.placement) - 1
        self.done: dict[_Value, float] = {}
        self.sleeping: dict[_Value, list[int]] = {}
        self.awake = deque(range(len(self.lists)))
        self.at = [0] * len(self.lists)
        self.clock = [0.0] * len(self.lists)
        self.spans: list[list[Span]] = [[] for _ in self.lists]

    def needs(self, action: Action) -> tuple[_Value, ...]:
        """Values that must be there before the action starts."""
        op, stage, m = action
        if op is Op.F:
            return ((True, stage - 1, m),) if stage else ()
        if op is Op.W:
            return ((False, stage, m),)
        own = (True, stage, m)
        return (own,) if stage == self.last_stage else (own, (False, stage + 1, m))

    def advance(self, rank: int) -> None:
        """Run a rank's list until an input is missing."""
        actions, done, latency = self.lists[rank], self.done, self.latency
        while self.at[rank] < len(actions):
            action = actions[self.at[rank]]
            start = self.clock[rank]
            for value in self.needs(action):
                if value not in done:
                    self.sleeping.setdefault(value, []).append(rank)
                    return
                there = done[value]
                if latency and self.placement[value[1]] != rank:
                    there += latency
                start = max(start, there)
            end = start + self.cost(action)
            self.clock[rank] = end
            self.spans[rank].append(Span(start, end, action))
            self.at[rank] += 1
            if action.op is not Op.W:
                made = (action.op is Op.F, action.stage, action.microbatch)
                done[made] = end
                self.awake.extend(self.sleeping.pop(made, ()))


def simulate(schedule: Schedule, cost: Cost = unit_cost, *, latency: float = 0.0) -> Simulation:
    """Run every rank's list in virtual time; a message arrives `latency` after what it carries.

    Raises ScheduleError if the schedule deadlocks.
    """
    run = _Run(schedule, cost, latency)
    while run.awake:
        run.advance(run.awake.popleft())
    stuck = {r: str(row[i]) for r, (i, row) in enumerate(zip(run.at, run.lists, strict=True))
             if i < len(row)}  # fmt: skip
    if stuck:
        raise ScheduleError(f"schedule deadlocks; each rank waits at {stuck}")
    makespan = max(run.clock)
    busy = [sum(span.end - span.start for span in row) for row in run.spans]
    return Simulation(
        makespan=makespan,
        bubble=1 - min(busy) / makespan,
        peak_live=tuple(_peak_live(row) for row in schedule.lists),
        spans=tuple(tuple(row) for row in run.spans),
    )


def _peak_live(actions: tuple[Action, ...]) -> int:
    released = {(a.stage, a.microbatch) for a in actions if a.op is Op.B or a.op is Op.W}
    live = peak = 0
    for op, stage, m in actions:
        if (stage, m) in released:
            live += (op is Op.F) - (op is Op.B or op is Op.W)
            peak = max(peak, live)
    return peak
