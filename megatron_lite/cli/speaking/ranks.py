"""A tool that uses a model, in one process or over the ranks of tp and pp that torchrun started."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from megatron_lite.blueprint.draw_up import draw_grid
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.heartbeat import Alone, Presence
from megatron_lite.rendezvous.launch import (
    Launch,
    choose_device,
    gather_ranks,
    read_launch,
    start_process_group,
    stop_process_group,
)
from megatron_lite.train.ending.failures import Failures, end_process

_Found = TypeVar("_Found")

RanksWork = Callable[[ParallelContext, Presence], int]
"""What the ranks do; returns the exit code.  presence: to be told of progress."""


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """How the model is shared by the ranks."""
    group = parser.add_argument_group("ranks")
    for axis in ("tensor", "pipeline"):
        group.add_argument(
            f"--{axis}-model-parallel-size", type=int, default=1, metavar="N",
            help="ranks that share the model",
        )  # fmt: skip


def on_ranks(
    asked: argparse.Namespace,
    work: RanksWork,
    *,
    further: bool = False,
    farewell: Callable[[], None] = lambda: None,
) -> int:
    """Join the other ranks, where there are any, and work; a lost rank ends the others with its name.

    asked: with the flags of add_layout_flags, use_cpu and debug.  further: whether more ranks than
    share the model may come, as data-parallel ones.  farewell: called before a lost rank ends this
    process, whatever its main thread is at.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # our one line says more of a lost rank
    launch = read_launch()
    parallel = ParallelConfig(
        tensor_model_parallel_size=asked.tensor_model_parallel_size,
        pipeline_model_parallel_size=asked.pipeline_model_parallel_size,
    )
    told_once(lambda: _check_ranks(parallel, launch, further=further))
    device = choose_device(launch, use_cpu=asked.use_cpu, backend=None)
    if launch.world_size == 1:
        return work(ParallelContext.serial(device), Alone())
    failures = Failures(
        launch.rank, folder=None, debug=asked.debug, speaks_first=launch.local_rank == 0
    )

    def lost(verdict: str) -> None:
        farewell()
        failures.lost(verdict)

    try:
        failures.device, failures.plan = device, _for_less_memory
        world = gather_ranks(launch, parallel, end=lost)
        failures.presence = world.presence
        start_process_group(launch, parallel, device, world)
        grid = draw_grid(parallel, launch.world_size)
        code = work(ParallelContext.from_grid(grid, launch.rank, device), world.presence)
    except BaseException as error:
        end_process(failures.report(error))
    stop_process_group()
    world.presence.leave()
    return code


def told_once(find: Callable[[], _Found]) -> _Found:
    """What it finds; a ConfigError that all ranks of a host find before they have met is one line."""
    try:
        return find()
    except ConfigError as error:
        launch = read_launch()
        if launch.world_size == 1:
            raise
        first = launch.local_rank == 0
        failures = Failures(
            launch.rank, folder=None, debug="--debug" in sys.argv, speaks_first=first
        )
        raise SystemExit(failures.report(error)) from error


def counted(presence: Presence) -> Callable[[], None]:
    """To be called whenever something is done.

    From its first call on a minute without heartbeats is a lost rank, as in training: gloo may wait
    for ever for a peer that was killed in the midst of a collective.
    """
    done = itertools.count()
    return lambda: presence.reached(next(done))


def _for_less_memory(missing: float, *, on_gpu: bool, room: float) -> str:
    return (
        " - fewer texts at once (--rows, --batch-size), shorter ones (--max-length, --cache-tokens), or "
        "more ranks to share the model"
    )


def _check_ranks(parallel: ParallelConfig, launch: Launch, *, further: bool) -> None:
    if min(parallel.tp, parallel.pp) < 1:
        raise ConfigError("--*-model-parallel-size must be at least 1")
    share = parallel.tp * parallel.pp
    if launch.world_size % share if further else launch.world_size != share:
        raise ConfigError(
            f"--tensor-model-parallel-size {parallel.tp} x --pipeline-model-parallel-size {parallel.pp} "
            f"are {share} ranks, {launch.world_size} were started: tools/launch.py --nproc_per_node "
            f"{share}{', or a multiple of it,' if further else ''} starts them"
        )
