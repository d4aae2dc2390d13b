"""CPU seconds to generate, lower and check a schedule, beside torch.distributed.pipelining's lowering.

python benchmarks/bench_schedules.py      pp 8, 1536 micro batches; interleaved with 3 chunks
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed.pipelining.schedules import _Action, _add_send_recv

from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import Schedule
from megatron_lite.blueprint.schedules.check import check_schedule
from megatron_lite.blueprint.schedules.lower import lower

PP, MICROBATCHES, REPEATS = 8, 1536, 3
CHUNKS = {"interleaved": 3, "zb-v": 2}


def seconds(work: Callable[[], Any]) -> float:
    """The best of some runs."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def generated(name: str, num_microbatches: int) -> Schedule:
    """The compute-only lists."""
    kind = SCHEDULES[name]
    return kind.generate(kind.place(PP, CHUNKS.get(name, 1)), num_microbatches)


def torchs(schedule: Schedule) -> float:
    """torch's lowering of the same lists, once."""
    lists = {
        rank: [_Action.from_str(str(action)) for action in row]
        for rank, row in enumerate(schedule.lists)
    }
    start = time.process_time()
    _add_send_recv(
        lists,
        stage_to_rank=lambda stage: schedule.placement[stage],
        num_stages=len(schedule.placement),
    )
    return time.process_time() - start


def main() -> None:
    """One line per schedule."""
    print(f"pp {PP}, {MICROBATCHES} micro batches; CPU seconds, best of {REPEATS}")
    print(f"{'schedule':14s} generate   lower   check   torch's lowering   ours / torch's   "
          "lower at twice the micro batches / at once")  # fmt: skip
    for name in SCHEDULES:
        schedule = generated(name, MICROBATCHES)
        lowered = lower(schedule)
        makes = seconds(lambda name=name: generated(name, MICROBATCHES))
        lowers = seconds(lambda schedule=schedule: lower(schedule))
        checks = seconds(
            lambda lowered=lowered, schedule=schedule: check_schedule(
                lowered, schedule.placement, MICROBATCHES
            )
        )
        twice = generated(name, 2 * MICROBATCHES)
        doubled = seconds(lambda twice=twice: lower(twice))
        theirs = torchs(schedule)
        print(f"{name:14s} {makes:8.3f} {lowers:7.3f} {checks:7.3f} {theirs:18.3f} "
              f"{lowers / theirs:16.3f} {doubled / lowers:10.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
