"""The executor on gloo takes the time that the simulation says, in every schedule.

Every action sleeps for its simulated length, so the number of cores does not matter; messages are
real.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_lite.blueprint.schedules.actions import Schedule
from megatron_lite.blueprint.schedules.lower import lower
from megatron_lite.blueprint.schedules.simulate import simulate
from megatron_lite.parallel.context import Axis
from megatron_lite.pipeline.executor import Executor
from megatron_lite.pipeline.mail import Mail
from tests.support.schedules import scheduled
from tests.support.spawn import spawn

PP, MICROBATCHES = 3, 3
UNIT = 0.05
"""Seconds of the forward of a whole stage; long beside a busy machine's time slices."""

TRIES, GOOD = 4, 0.04
"""A run that another process disturbed is tried again; one so close to the simulation is not."""

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}


def drawn(name: str) -> Schedule:
    return scheduled(name, PP, MICROBATCHES, CHUNKS[name])


@dataclass
class Sleeper:
    """A stage that computes nothing for as long as its layers would take; see pipeline.stage.Stage."""

    is_first: bool
    is_last: bool
    forward_seconds: float
    num_live: int = 0
    pending_wgrads: None = None

    def forward(self, microbatch, batch, received, scale):
        time.sleep(self.forward_seconds)
        return None if self.is_last else torch.full((1,), float(microbatch))

    def backward(self, microbatch, received, *, defer_wgrads=False):
        time.sleep(self.forward_seconds * (1 if defer_wgrads else 2))
        return None if self.is_first else torch.full((1,), float(microbatch))

    def weight_gradients(self, microbatch) -> None:
        time.sleep(self.forward_seconds)

    def take_totals(self):
        return []


def simulated(name: str) -> float:
    return simulate(drawn(name)).makespan * UNIT / CHUNKS[name]


def sleep_through(rank: int, ranks: int) -> dict[str, float]:
    """Seconds from the first rank's start to the last one's end, the best of the tries."""
    best = dict.fromkeys(CHUNKS, float("inf"))
    for name in CHUNKS:
        for _ in range(TRIES):
            best[name] = min(best[name], makespan(name, rank, ranks))
            if best[name] < simulated(name) * (1 + GOOD):  # the same on every rank
                break
    return best


def makespan(name: str, rank: int, ranks: int) -> float:
    """One run, by the machine's one clock."""
    axis = Axis("pp", rank, ranks, tuple(range(ranks)), dist.group.WORLD)
    schedule = drawn(name)
    last = len(schedule.placement) - 1
    stages = {
        n: Sleeper(n == 0, n == last, UNIT / CHUNKS[name])
        for n, holder in enumerate(schedule.placement)
        if holder == rank
    }
    mail = Mail(axis, schedule.placement)
    mail.expect((1,), torch.float32, torch.device("cpu"))
    executor = Executor(stages, mail, begin_last_backward=lambda stage, pending_wgrads: None)  # type: ignore[arg-type]
    actions = lower(schedule)[rank]
    dist.barrier()
    start = time.monotonic()
    executor.run(actions, [None] * MICROBATCHES, torch.ones(()))  # type: ignore[list-item]
    times = torch.tensor([-start, time.monotonic()], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.sum().item()


@pytest.fixture(scope="module")
def makespans() -> dict[str, float]:
    return spawn(sleep_through, PP)[0]


@pytest.mark.parametrize("name", CHUNKS)
def test_a_run_takes_the_simulated_time(name: str, makespans: dict[str, float]) -> None:
    assert makespans[name] == pytest.approx(simulated(name), rel=0.1)


def test_zero_bubble_beats_interleaved_beats_1f1b(makespans: dict[str, float]) -> None:
    zero_bubble = max(makespans["zb-h1"], makespans["zb-v"])  # so few micro batches: both 11 units
    assert zero_bubble < makespans["interleaved"] < makespans["1f1b"]
