"""What to say when a rank is out of memory: its plan, and the cheapest change that frees enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.parallel import RECOMPUTE_MODULES, ParallelConfig
from megatron_lite.planner.advice import recompute_flags
from megatron_lite.planner.memory import RankMemory

Planned = Callable[[ParallelConfig, int], RankMemory]
"""(layout, micro batch size) -> the rank's memory in the same run; ConfigError where no rule allows it."""

_SHOWN = 4


def beside_the_plan(
    parallel: ParallelConfig, micro_batch_size: int, planned: Planned, missing: float, room: float
) -> str:
    """The rank's plan, and the first change that frees more than what was missing.

    room: bytes of the device; where the plan already needs more, the change brings it below.  Both
    are 0 where they are not known.
    """
    now = planned(parallel, micro_batch_size)
    largest = sorted(now.kinds.items(), key=lambda kind: -kind[1])[:_SHOWN]
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    said = f" - planned {_gib(now.total)} ({listed})"
    most = room if 0 < room < now.total else now.total
    for flags, layout, size in _changes(parallel, micro_batch_size):
        try:
            then = planned(layout, size).total
        except ConfigError:
            continue
        freed = now.total - then
        if freed > missing * 1.1 and then <= most:
            return f"{said} - the cheapest change by the plan: {flags} frees {_gib(freed)}"
    lacks = f" of {_gib(room)}" if most < now.total else ""
    return f"{said}{lacks} - no single change frees enough: split the model over more ranks, see tools/plan.py"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _changes(p: ParallelConfig, micro: int) -> Iterator[tuple[str, ParallelConfig, int]]:
    """From what costs next to nothing to what costs a third of the speed."""

    def with_(**changes: Any) -> ParallelConfig:
        return dataclasses.replace(p, **changes)

    if not p.shares_state:
        yield "--use-distributed-optimizer", with_(zero_stage=1), micro
    if not p.sequence_parallel and p.tp > 1:
        yield "--sequence-parallel", with_(sequence_parallel=True), micro
    if p.zero_stage < 2 and p.pp == 1:  # with a pipeline gradients and weights are whole in a step
        yield "--zero-stage 2", with_(zero_stage=2), micro
    if micro > 1:
        yield f"--micro-batch-size {micro // 2}", p, micro // 2
    yield from _parts_again(p, micro, with_mlp=False)
    if p.zero_stage < 3 and p.pp == 1:
        yield "--zero-stage 3", with_(zero_stage=3), micro
    yield from _parts_again(p, micro, with_mlp=True)
    if p.recompute_granularity != "full":
        full = with_(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
        flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        yield flags, full, micro
    if micro > 2:
        yield "--micro-batch-size 1", p, 1
    if not p.on_host:
        yield "--optimizer-cpu-offload", with_(optimizer_cpu_offload=True), micro
    for flag, name, size in (
        ("--tensor-model-parallel-size", "tensor_model_parallel_size", p.tp * 2),
        ("--pipeline-model-parallel-size", "pipeline_model_parallel_size", p.pp * 2),
    ):
        yield f"{flag} {size}", with_(**{name: size}), micro


def _parts_again(
    p: ParallelConfig, micro: int, *, with_mlp: bool
) -> Iterator[tuple[str, ParallelConfig, int]]:
    """More parts of each layer than are recomputed now, few first."""
    if p.recompute_granularity == "full":
        return
    now = set(p.recompute_modules) if p.recompute_granularity == "selective" else set[str]()
    for number in range(1, len(RECOMPUTE_MODULES) + 1):
        for modules in combinations(RECOMPUTE_MODULES, number):
            if now < set(modules) and ("mlp" in modules) == with_mlp:
                then = dataclasses.replace(
                    p, recompute_granularity="selective", recompute_modules=list(modules)
                )
                yield recompute_flags(then), then, micro
