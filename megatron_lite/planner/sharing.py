"""What ZeRO's stages share between the data-parallel ranks, and what each then has whole for a moment.

            each of d ranks keeps                         and sends in a step, in passes over the parameters
stage 0     weights, gradients, masters and moments       gradients summed: 2
stage 1     of masters and moments a d-th                 gradients scattered: 1, weights gathered: 1
stage 2     of gradients, too                             gradients 1 per micro batch, weights 1
stage 3     of weights, too                               per micro batch gradients 1, weights 2

(arXiv:1910.02054 sections 5 and 7, which count one micro batch.)  With a pipeline gradients stay whole
until the last micro batch and weights from the first one on: they pass once, and a step has them beside
the d-th that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.blueprint.buckets import IN_FLIGHT, bucket_elements
from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.planner.activations import element_bytes
from megatron_lite.planner.awake import Awake, gradients_awake, weights_awake


@dataclass(frozen=True, slots=True)
class Shares:
    """Ranks that share each kind of what is kept at every moment; 1: each has all of it."""

    weights: int
    gradients: int
    state: int


def shared_by(parallel: ParallelConfig, replicas: int) -> Shares:
    """Of a layout whose weights so many ranks hold."""
    stage = parallel.zero_stage
    return Shares(
        weights=replicas if stage == 3 else 1,
        gradients=replicas if stage >= 2 else 1,
        state=replicas if stage >= 1 else 1,
    )


@dataclass(frozen=True, slots=True)
class Passed:
    """Bytes of gradients and weights that the data-parallel ranks pass in a step.

    gradients: scattered or summed; forward, backward: weights gathered for these; updated: weights after
    an update.  Each as often as a ring passes it, twice what is all-reduced, in each of so many times.
    awaited: what nothing hides of a step's first forward; kept: what of the others is there already.
    unknown: what the first micro batch of a run gathers besides; the second finds nothing kept.
    """

    gradients: float = 0.0
    forward: float = 0.0
    awaited: float = 0.0
    backward: float = 0.0
    updated: float = 0.0
    times: int = 1
    kept: float = 0.0
    unknown: float = 0.0

    @property
    def total(self) -> float:
        """All of them in the first step of a run."""
        each = self.gradients + self.forward + self.backward
        there = self.kept * max(self.times - 2, 0)
        return self.times * each - there + self.updated + self.unknown


def passed(
    blueprint: Blueprint,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    pp_rank: int,
    *,
    num_microbatches: int,
    updates: bool = True,
) -> Passed:
    """In a step of so many micro batches.

    updates: whether an update follows; none does where curvature is observed.
    """
    held, low = blueprint.held(pp_rank), element_bytes(precision)
    wide = 4 if parallel.accumulate_allreduce_grads_in_fp32 else low
    shared = shared_by(parallel, blueprint.replicas)
    gradients = float(held.accumulated * wide)
    if shared.state == 1:
        return Passed(2 * gradients)
    times = num_microbatches if shared.gradients > 1 and parallel.pp == 1 else 1
    if shared.weights == 1:
        return Passed(gradients, updated=float(held.accumulated * low * updates), times=times)
    if parallel.pp > 1:
        return Passed(gradients, forward=float(held.parameters * low))
    read = weights_awake(
        blueprint.figure, tp=blueprint.grid.tp, recompute=RecomputePlan.from_config(parallel)
    )
    wider = skew(blueprint, parallel)
    width = wider * low
    return Passed(
        gradients * wider, read.forward * width, read.awaited * width, read.backward * width,
        times=times, kept=read.kept * width, unknown=read.unknown * width,
    )  # fmt: skip


def skew(blueprint: Blueprint, parallel: ParallelConfig) -> float:
    """How much wider the shares of a layer are than its replicas' part of it, at stage 3.

    A matrix that is updated whole is one rank's; all shares are as wide as the widest.
    """
    if shared_by(parallel, blueprint.replicas).weights == 1:
        return 1.0
    layers = blueprint.figure.kinds(range(len(blueprint.figure.layers)))
    size = max((layer.size for layer in layers), default=0)
    largest = max(blueprint.held(rank).largest_matrix for rank in range(blueprint.grid.pp))
    return max(1.0, blueprint.replicas * largest / size) if size else 1.0


@dataclass(frozen=True, slots=True)
class Whole:
    """Bytes of weights and gradients that are whole beside what is kept at every moment.

    arriving: while the head's weights come; forward, head: while it computes forward or backward; blocks:
    while each block computes backward, in that order, and has done so; end: when the last gradients are packed.
    """

    arriving: float = 0.0
    forward: float = 0.0
    head: float = 0.0
    blocks: tuple[float, ...] = ()
    packing: tuple[float, ...] = ()
    end: float = 0.0

    def in_blocks(self, kept: float) -> float:
        """The most beside `kept` bytes of activations, of which each block frees its own."""
        count = max(len(self.blocks), 1)
        sizes = [size - kept * k / count for k, size in enumerate(self.blocks)]
        sizes += (size - kept * (k + 1) / count for k, size in enumerate(self.packing))
        return max(sizes, default=0.0)


def whole_bytes(
    blueprint: Blueprint,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    pp_rank: int,
    *,
    num_microbatches: int,
) -> Whole:
    """Of any rank of a pp rank, at the moments of such a step that may be its worst."""
    replicas, low = blueprint.replicas, element_bytes(precision)
    shared = shared_by(parallel, replicas)
    if shared.weights == shared.gradients == 1:
        return Whole()
    held, figure, tp = blueprint.held(pp_rank), blueprint.figure, blueprint.grid.tp
    wide = 4 if parallel.accumulate_allreduce_grads_in_fp32 else low
    apart = shared.weights > 1
    if parallel.pp > 1:
        gradients = float(held.accumulated * wide)
        always = gradients + apart * float(held.parameters * low)
        return Whole(always, always, always, (always,), (), gradients)
    bucket = None if apart else bucket_elements(parallel, replicas)
    summed = gradients_awake(
        figure, tp=tp, bucket=bucket, ranks=replicas, again=num_microbatches > 1
    )
    none = (0.0,) * len(figure.layers)
    read = Awake(0.0, 0.0, 0.0, none, none, 0.0)
    if apart:
        read = weights_awake(figure, tp=tp, recompute=RecomputePlan.from_config(parallel)).awake

    def both(gradients: float, weights: float) -> float:
        return gradients * wide + weights * low

    return Whole(
        both(summed.arriving, read.arriving),
        both(summed.forward, read.forward),
        both(summed.head, read.head),
        tuple(both(*pair) for pair in zip(summed.blocks, read.blocks, strict=True)),
        tuple(both(*pair) for pair in zip(summed.packing, read.packing, strict=True)),
        both(summed.end, read.end),
    )


def data_parallel_buffers(
    blueprint: Blueprint,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    pp_rank: int,
    *,
    on_gpu: bool,
) -> tuple[float, float]:
    """(gradients packed for the owners of their rows, parameters on their way back), in bytes."""
    replicas, parameters = blueprint.replicas, blueprint.held(pp_rank).accumulated
    if not parallel.shares_state or replicas == 1:
        return 0.0, 0.0
    low = element_bytes(precision)
    wide = 4 if parallel.accumulate_allreduce_grads_in_fp32 else low
    bucket = bucket_elements(parallel, replicas)
    packed = float(min(IN_FLIGHT * bucket, parameters))
    once_more = 1 + 1 / replicas
    scattered = packed * once_more
    if parallel.shares_gradients:  # counted among what is whole, but for one with a pipeline
        scattered = float(min(bucket, parameters)) if parallel.pp > 1 else 0.0
    copied = 0 if on_gpu else min(bucket, parameters)  # gloo reduces a copy, one at a time
    gathered = 0.0 if parallel.zero_stage == 3 else packed  # or where they are read
    return (scattered + copied) * wide, gathered * low * once_more
