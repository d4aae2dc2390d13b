"""The rehearsal: the trainer's own code as any rank of a world, in one process, on the meta device.

stand_in(config, blueprint, rank)   real groups, stages, engine, on the meta device
  .perform()                        one training step of 3 pp micro batches and one evaluation
Rehearsed                           every call to others, and where its memory went
compare_calls(logs)                 do the ranks fit together?          parallel/calls/log.py
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch

from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.blueprint.timeline import HOST_SPAN
from megatron_lite.config.errors import DistributedError
from megatron_lite.config.extensions import extend, extensions
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.data.batch import Batch, collate
from megatron_lite.data.documents import DocumentEnds
from megatron_lite.data.sources import kind_for
from megatron_lite.parallel.calls.log import CallLog, compare_calls
from megatron_lite.parallel.calls.recorder import CallRecorder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import MASTER
from megatron_lite.rehearsal.meta_tensors import Forms, MetaTensorMode
from megatron_lite.rehearsal.process_group import simulated_rank
from megatron_lite.train.assemble import assemble
from megatron_lite.train.measuring.timing import RunTimers
from megatron_lite.train.run import Run
from megatron_lite.train.step import evaluation_step, train_step

ROUNDS = 3
"""Micro batches per pipeline rank that are rehearsed: enough for a steady phase."""

_WORTH_A_PROCESS = 2000
"""Layers times micro batches times ranks, of which a second takes a few hundred."""

_MOST_WORKERS = 8

_SHOWN = 12
"""Disagreements that are listed."""

TRAINING, EVALUATION = "training step", "evaluation"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device at the worst moment of a training step, by kind.

    activations: the most that lives between two actions, messages in flight included; work: what
    the worst action takes on top, logits and the reduction's buffers included.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    work: int
    allocations: int

    def kinds(self) -> dict[str, float]:
        """Kind -> bytes; they add up to the peak."""
        return {
            kind: float(getattr(self, kind))
            for kind in ("weights", "gradients", "masters", "moments", "activations", "work")
        }

    @property
    def peak(self) -> int:
        """All of it."""
        return round(sum(self.kinds().values()))


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """One rank's calls and memory; memory is None where it failed.

    place: its coordinates in words.  process_bytes: memory of the process that rehearsed it.
    """

    log: CallLog
    place: str
    memory: Memory | None
    seconds: float
    process_bytes: int

    def sent_bytes(self) -> dict[str, float]:
        """Axis -> bytes sent in the training step."""
        return self.log.sent_bytes(TRAINING)

    def describe(self) -> str:
        """One line of progress."""
        calls = f"rank {self.log.rank} ({self.place}): {len(self.log.calls):,} calls"
        if self.memory is None:
            return f"{calls}, BROKE OFF, {self.seconds:.1f} s"
        return (
            f"{calls}, {self.memory.allocations:,} allocations, peak "
            f"{self.memory.peak / 2**20:,.0f} MiB, {self.seconds:.1f} s"
        )


class _Places(RunTimers):
    """Measures nothing, and has what is made for the host not counted as the device's."""

    def __init__(self, tensors: MetaTensorMode) -> None:
        super().__init__(level=0)
        self._tensors = tensors

    def span(self, name: str, action: Action | None = None) -> AbstractContextManager[None]:
        """Of its name."""
        return self._tensors.elsewhere() if name == HOST_SPAN else nullcontext()


class StandIn:
    """One rank of the world, assembled without memory and not yet begun; see stand_in()."""

    def __init__(
        self, config: RunConfig, blueprint: Blueprint, rank: int, tensors: MetaTensorMode
    ) -> None:
        self.config, self.blueprint, self._tensors = config, blueprint, tensors
        began = time.perf_counter()
        grid = blueprint.grid
        ctx = (
            ParallelContext.from_grid(grid, rank, torch.device("meta"))
            if grid.world_size > 1
            else ParallelContext.serial("meta")
        )
        self.log = CallLog(rank, pp=ctx.pp.rank)
        self.recorder = CallRecorder(self.log)
        timers = RunTimers(level=0) if config.train.use_cpu else _Places(tensors)
        self.run: Run = assemble(config, blueprint, ctx.observed(self.recorder), timers=timers)
        self.run.pipeline.reached = self._reached
        self.batches = make_batches(config, num_microbatches(blueprint))
        self._seconds = time.perf_counter() - began

    def _reached(self, position: int, group: Sequence[Action]) -> None:
        self.recorder.reached(position, group)
        self._tensors.between_actions()

    def perform(self) -> Rehearsed:
        """One training step and, where the run evaluates, one evaluation batch of pp micro batches."""
        began = time.perf_counter()
        memory = None
        try:
            memory = self._train()
            if self.config.train.eval_iters:
                self._evaluate()
            self.run.engine.wait_for_param_gather()
        except Exception as error:  # whatever it is, this rank would stop here
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            self.log.failed_at = f"{said} - in its {self.recorder.place}"
        at = self.run.ctx
        return Rehearsed(
            self.log,
            place=f"tp {at.tp.rank} dp {at.dp.rank} pp {at.pp.rank}",
            memory=memory,
            seconds=self._seconds + time.perf_counter() - began,
            process_bytes=_process_bytes(),
        )

    def _train(self) -> Memory:
        tensors = self._tensors
        tensors.step_begins()
        self.recorder.begin(TRAINING)
        train_step(self.run, self.batches, lr=1e-4, weight_decay=0.01)
        static = self._static()
        activations = tensors.most_kept
        rest = tensors.peak - sum(static.values()) - activations
        return Memory(**static, activations=activations, work=rest, allocations=tensors.allocations)

    def _evaluate(self) -> None:
        self.recorder.begin(EVALUATION)
        evaluation_step(self.run, self.batches[: self.blueprint.grid.pp])

    def _static(self) -> dict[str, int]:
        """Bytes that are alive all the time."""
        engine = self.run.engine
        held = (*engine.weights(owned=False), *self.run.bits())
        weights = {w.data.untyped_storage()._cdata: w.data for w in held}
        state = {(part.name.startswith(MASTER), id(part.data)): part.data
                 for part in engine.state(owned=False)
                 if self._tensors.lies_here(part.data)}  # fmt: skip
        sums = (*(a for _, a in engine.accumulators()),
                *(part.data for part in engine.gradients(owned=False)))  # fmt: skip
        buffers = {a.untyped_storage()._cdata: a for a in sums}
        return {
            "weights": sum(w.untyped_storage().nbytes() for w in weights.values()),
            "gradients": sum(a.untyped_storage().nbytes() for a in buffers.values()),
            "masters": sum(data.nbytes for (master, _), data in state.items() if master),
            "moments": sum(data.nbytes for (master, _), data in state.items() if not master),
        }


@contextmanager
def stand_in(
    config: RunConfig, blueprint: Blueprint, rank: int, forms: Forms | None = None
) -> Iterator[StandIn]:
    """This process as `rank`, its stages and optimizer built by the trainer's own code.

    forms: what ranks before it have learnt of operations' shapes.
    """
    config = _without_device(config)
    known = forms if forms is not None else {}
    with simulated_rank(rank, blueprint.grid.world_size), MetaTensorMode(known) as tensors:
        yield StandIn(config, blueprint, rank, tensors)


def rehearse_rank(
    config: RunConfig, blueprint: Blueprint, rank: int, forms: Forms | None = None
) -> Rehearsed:
    """One rank from its construction to the end of its step."""
    with stand_in(config, blueprint, rank, forms) as actor:
        return actor.perform()


def rehearse(
    config: RunConfig, world_size: int, ranks: Sequence[int], *, workers: int | None = None
) -> Iterator[Rehearsed]:
    """The ranks in order: one after the other or, if there are many, by a worker process per core.

    Raises DistributedError where a worker process dies.
    """
    blueprint, forms = draw_up(config, world_size), Forms()
    if workers is None:
        workers = _workers(blueprint, len(ranks))
    if workers <= 1:
        for rank in ranks:
            yield rehearse_rank(config, blueprint, rank, forms)
        return
    try:
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, extend, (extensions(),)) as pool:
            yield from pool.map(_rehearse_there, ((config, world_size, rank) for rank in ranks))
    except BrokenProcessPool as error:
        raise DistributedError(
            "a worker process of the rehearsal died (killed, or out of memory?)"
        ) from error


def _workers(blueprint: Blueprint, ranks: int) -> int:
    """One per core; one alone where all is done before a second has imported torch."""
    layers = blueprint.model.num_layers / blueprint.grid.pp
    if layers * num_microbatches(blueprint) * ranks < _WORTH_A_PROCESS:
        return 1
    return min(os.cpu_count() or 1, ranks, _MOST_WORKERS)


def _rehearse_there(job: tuple[RunConfig, int, int]) -> Rehearsed:
    config, world_size, rank = job
    torch.set_num_threads(1)
    return rehearse_rank(config, draw_up(config, world_size), rank)


def one_of_each(grid: RankGrid) -> list[int]:
    """Ranks that stand for all: of each stage the first, the last over tp, and the last over dp.

    Ranks that differ in tp or dp alone run the same code on the same shapes but for the ends: the
    last tp ranks hold the padding of the vocabulary, and rounding may leave the last dp ranks less.
    """
    places = {(0, 0), (grid.tp - 1, 0), (0, grid.dp - 1)}
    return sorted(grid.rank(tp=tp, dp=dp, pp=pp) for pp in range(grid.pp) for tp, dp in places)


def num_microbatches(blueprint: Blueprint) -> int:
    """Of a rehearsed step: 3 pp, or all where it has fewer."""
    return min(ROUNDS * blueprint.grid.pp, blueprint.microbatches())


def require_agreement(logs: Sequence[CallLog]) -> str:
    """What fits, in words; raises DistributedError naming rank, place, call and shapes of what does not."""
    found, wrong = compare_calls(logs)
    if wrong:
        shown = "".join(f"\n  {line}" for line in wrong[:_SHOWN])
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DistributedError(f"these ranks would not fit together:{shown}{more}")
    return (
        f"{found.ranks} ranks fit together: {found.collectives:,} collectives of {found.groups} groups "
        f"and {found.messages:,} messages between {found.pairs} pairs of ranks, same order, shapes and "
        "number formats; no deadlock even if every call waits for its partners"
    )


def _process_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def make_batches(config: RunConfig, count: int) -> list[Batch]:
    """Micro batches of the run's shapes; their values mean nothing."""
    sample = kind_for(config.train.objective).example(config.model.seq_length)
    samples = [sample] * config.train.micro_batch_size
    ends = DocumentEnds.from_config(config.data, eod=-1)  # an id that no token has
    return [collate(samples, np.arange(len(samples)), ends) for _ in range(count)]


def _without_device(config: RunConfig) -> RunConfig:
    """What needs a device to run is replaced by what allocates and says the same."""
    compiles = config.precision.compiles(on_gpu=not config.train.use_cpu)
    precision = dataclasses.replace(config.precision, torch_compile="on" if compiles else "off")
    if config.train.use_cpu and config.model.attention_dropout > 0.0:
        # what a CPU chooses, see kernels/table.py
        precision = dataclasses.replace(precision, attention_backend="unfused")
    parallel = config.parallel
    # DeepSpeed's needs its library and ranks; what it holds is much the same
    if parallel.engine == "deepspeed":
        parallel = dataclasses.replace(parallel, engine="zero")
    return dataclasses.replace(config, precision=precision, parallel=parallel)
