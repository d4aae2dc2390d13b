"""Bytes on each pipeline rank by kind, and whether they fit.

static     weights + gradients + masters + moments        every moment of the step
whole      of them what ZeRO 2 and 3 share, made whole    while it is used                 sharing.py
activity   activations at the schedule's worst moment + logits + what one backward needs
around     message buffers, the device's own context, allowance for fragmentation
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.figure.parts import WEIGHT_BYTES, Matrix, Parts, WeightFormat
from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import Op, Schedule
from megatron_lite.blueprint.stages import Placement, StageLayers
from megatron_lite.config.objectives import has_segments
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.planner.activations import (
    Items,
    StageBytes,
    block_items,
    deferred_wgrad_bytes,
    element_bytes,
    rotary_bytes,
    shared_mask_bytes,
    stage_bytes,
)
from megatron_lite.planner.awake import has_adapters
from megatron_lite.planner.head import HeadBytes, head_bytes
from megatron_lite.planner.offload import on_host
from megatron_lite.planner.sharing import (
    Whole,
    data_parallel_buffers,
    shared_by,
    skew,
    whole_bytes,
)

CONTEXT_BYTES = 1.5e9
"""CUDA context, libraries and NCCL's channels, which torch does not count; about 1 to 2 GB."""

FRAGMENTATION = 0.05
"""Allowance: share of what is allocated that the caching allocator holds but cannot use."""


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """The sections of a config that decide memory and time beside the Blueprint.

    segments: whether packed documents do not see one another (--reset-attention-mask, --objective sft).
    """

    parallel: ParallelConfig
    precision: PrecisionConfig
    micro_batch_size: int
    on_gpu: bool = True
    segments: bool = False

    @classmethod
    def of(
        cls,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        train: TrainConfig,
        data: DataConfig,
        *,
        on_gpu: bool,
    ) -> PlanInputs:
        """What a run of these sections needs."""
        return cls(
            parallel, precision, train.micro_batch_size, on_gpu=on_gpu,
            segments=has_segments(
                train.objective, reset_attention_mask=data.reset_attention_mask
            ),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of any rank of one pipeline rank, by kind, in the order of `kinds`."""

    pp_rank: int
    kinds: Mapping[str, float]
    parameters: int
    layers: tuple[int, ...]
    live: Mapping[int, int]
    """Stage -> micro batches it keeps at the worst moment."""
    worst_moment: str = "computing"
    """Or `reducing`, `updating`, `gathering`, after the last backward: activations are gone then."""
    computing: Mapping[str, float] = field(default_factory=dict)
    """Those of `kinds` that come and go with micro batches, at the worst moment among them."""
    host: float = 0.0
    """Bytes in the host's memory, where state lies there."""

    @property
    def allocated(self) -> float:
        """What the framework allocates at the worst moment: comparable with max_memory_allocated."""
        outside = ("context", "fragmentation")
        return sum(b for kind, b in self.kinds.items() if kind not in outside)

    @property
    def total(self) -> float:
        """What the device must hold."""
        return sum(self.kinds.values())


def memory(
    blueprint: Blueprint,
    asked: PlanInputs,
    *,
    num_microbatches: int | None = None,
    pp_ranks: Iterable[int] | None = None,
) -> tuple[RankMemory, ...]:
    """The memory of each pipeline rank once the batch has its full size, or in a step of so many.

    pp_ranks: only of these.
    """
    if num_microbatches is None:
        num_microbatches = blueprint.microbatches()
    schedule = _schedule(
        blueprint.schedule, blueprint.placement, peak_microbatches(blueprint, num_microbatches)
    )
    items = layer_items(blueprint, asked)
    return tuple(
        _rank_memory(blueprint, asked, schedule, items, pp_rank, num_microbatches)
        for pp_rank in (range(blueprint.grid.pp) if pp_ranks is None else pp_ranks)
    )


def layer_items(blueprint: Blueprint, asked: PlanInputs) -> list[Items]:
    """What every layer of the model keeps of a micro batch."""
    known: dict[int, Items] = {}
    for parts in blueprint.figure.layers:
        if id(parts) not in known:
            known[id(parts)] = block_items(
                parts,
                blueprint.model,
                asked.parallel,
                asked.precision,
                micro_batch_size=asked.micro_batch_size,
                on_gpu=asked.on_gpu,
                segments=asked.segments,
            )
    return [known[id(parts)] for parts in blueprint.figure.layers]


@lru_cache(maxsize=64)  # a search asks for few, thousands of times
def _schedule(name: str, placement: Placement, num_microbatches: int) -> Schedule:
    return SCHEDULES[name].generate(placement, num_microbatches)


def peak_microbatches(blueprint: Blueprint, num_microbatches: int) -> int:
    """A number of micro batches that shows the schedule's worst moment, not more than there are.

    Every schedule but gpipe reaches it in its steady phase, which begins within 2 pp.
    """
    if blueprint.schedule == "gpipe":
        return num_microbatches
    pp = blueprint.grid.pp
    return min(num_microbatches, 3 * pp)


def static_bytes(
    formats: Mapping[WeightFormat | None, float],
    states: float,
    asked: PlanInputs,
    dp: int,
    *,
    trained: Mapping[WeightFormat | None, float] | None = None,
    accumulated: float | None = None,
) -> dict[str, float]:
    """Weights, gradients, masters and moments of a rank.

    formats: parameters by the number format they are stored in, None for the run's; states:
    bytes of optimizer state, of all ranks that share it; trained: those that are not frozen; accumulated:
    those of them that have gradients in a step, all by default.
    """
    low = element_bytes(asked.precision)
    widths = {kind: WEIGHT_BYTES[kind] if kind else low for kind in formats}
    trained = formats if trained is None else trained
    accumulated = sum(trained.values()) if accumulated is None else accumulated
    in_fp32 = asked.parallel.accumulate_allreduce_grads_in_fp32
    shared = shared_by(asked.parallel, dp)
    weights = (  # what is packed is no parameter, and whole on each
        count * widths[kind] / (1 if kind == "nf4" else shared.weights)
        for kind, count in formats.items()
    )
    return {
        "weights": float(sum(weights)),
        "gradients": accumulated * (4 if in_fp32 else low) / shared.gradients,
        "masters": sum(n * 4 / shared.state for kind, n in trained.items() if widths[kind] < 4),
        "moments": states / shared.state,
    }


def layer_input_bytes(model: ModelConfig, asked: PlanInputs) -> float:
    """The residual stream of a micro batch between two layers on one rank."""
    parallel = asked.parallel
    tokens = model.seq_length * asked.micro_batch_size / parallel.cp
    split = parallel.tp if parallel.splits_sequence else 1
    return tokens * model.hidden_size * element_bytes(asked.precision) / split


def static_total(blueprint: Blueprint, asked: PlanInputs, pp_rank: int) -> float:
    """Bytes that a rank of a pp rank holds at every moment."""
    return sum(_static(blueprint, asked, pp_rank).values())


def _static(blueprint: Blueprint, asked: PlanInputs, pp_rank: int) -> dict[str, float]:
    held = blueprint.held(pp_rank)
    kinds = static_bytes(
        held.formats, held.state_bytes, asked, blueprint.replicas,
        trained=held.trained, accumulated=held.accumulated,
    )  # fmt: skip
    shared = shared_by(asked.parallel, blueprint.replicas)
    if has_adapters(blueprint.figure) and shared.weights > 1:  # adapters are whole on each
        whole = held.num_trained * element_bytes(asked.precision)
        kinds["weights"] += whole * (1 - 1 / shared.weights)
    wider = skew(blueprint, asked.parallel)
    kinds |= {kind: kinds[kind] * wider for kind in ("weights", "gradients")}
    if element_bytes(asked.precision) == 4:  # whole matrices on their owners, the weights once more
        kinds["masters"] += held.gathered * 4 / shared.state
    there = on_host(blueprint, asked.parallel, asked.precision, pp_rank)
    return there.beside(kinds, on_gpu=asked.on_gpu)


def _rank_memory(
    blueprint: Blueprint,
    asked: PlanInputs,
    schedule: Schedule,
    items: Sequence[Items],
    pp_rank: int,
    num_microbatches: int,
) -> RankMemory:
    model, stages = blueprint.model, blueprint.stages_of(pp_rank)
    parameters = blueprint.held(pp_rank).parameters
    stream = layer_input_bytes(model, asked)
    held, waiting = {}, stage_waiting(blueprint, asked, pp_rank)
    whole = whole_bytes(
        blueprint, asked.parallel, asked.precision, pp_rank, num_microbatches=num_microbatches
    )
    for stage in stages:
        of_stage = [items[layer] for layer in stage.layers]
        blocks = stage_bytes(
            of_stage, asked.parallel, layer_input=stream, shared=_mask_bytes(model, asked),
            tables=rotary_bytes(blueprint.figure.kinds(stage.layers), model),
        )  # fmt: skip
        held[stage.index] = _held(blueprint, asked, stage, blocks, waiting[stage.index], whole)
    worst = _worst(schedule, pp_rank, held)
    kinds = _static(blueprint, asked, pp_rank)
    messages = 4 * stream if blueprint.grid.pp > 1 else 0.0
    reducing, gathering = data_parallel_buffers(
        blueprint, asked.parallel, asked.precision, pp_rank, on_gpu=asked.on_gpu
    )
    there = on_host(blueprint, asked.parallel, asked.precision, pp_rank)
    beside = 1.0 - there.share * asked.on_gpu
    updating = _UPDATING * blueprint.held(pp_rank).largest_matrix * beside
    computing, moment = worst.kinds, "computing"
    later = {"reducing": whole.end + reducing, "gathering": gathering, "updating": updating}
    if max(later.values()) > worst.total + messages:
        moment = max(later, key=lambda name: later[name])
        kept = whole.end if moment == "reducing" else 0.0
        worst, messages = _Moment(live=worst.live, whole=kept), later[moment] - kept
    kinds |= worst.kinds
    kinds["communication"] = messages
    kinds["context"] = CONTEXT_BYTES if asked.on_gpu else 0.0
    kinds["fragmentation"] = FRAGMENTATION * sum(kinds.values()) if asked.on_gpu else 0.0
    layers = tuple(n for stage in stages for n in stage.layers)
    host = there.bytes if asked.on_gpu else 0.0
    return RankMemory(pp_rank, kinds, parameters, layers, worst.live, moment, computing, host)


_UPDATING = 24.0
"""Bytes per element of a matrix while it is updated whole: four fp32 ones beside it and two of 16 bits."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """Bytes beside the static ones at one moment of a step."""

    activations: float = 0.0
    recomputed: float = 0.0
    logits: float = 0.0
    workspace: float = 0.0
    whole: float = 0.0
    live: Mapping[int, int] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.activations + self.recomputed + self.logits + self.workspace + self.whole

    @property
    def kinds(self) -> dict[str, float]:
        return {"whole": self.whole, "activations": self.activations, "recomputed": self.recomputed,
                "logits": self.logits, "workspace": self.workspace}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Held:
    """One stage and micro batch: kept, deferred, and what the moments of its actions add.

    A moment's activations are what is kept by other actions, so below zero where some are free.
    """

    kept: float
    deferred: float
    forward: tuple[_Moment, ...]
    backward: tuple[_Moment, ...]


def _held(
    blueprint: Blueprint,
    asked: PlanInputs,
    stage: StageLayers,
    blocks: StageBytes,
    deferred: float,
    whole: Whole,
) -> _Held:
    model, low = blueprint.model, element_bytes(asked.precision)
    tp = blueprint.grid.tp
    kept, stream = blocks.kept, layer_input_bytes(model, asked)
    workspace = blocks.backward
    kinds = blueprint.figure.kinds(stage.layers)
    workspace += _passing(asked) * max((largest_matrix(one, tp) for one in kinds), default=0.0)
    workspace += low * max((largest_packed(one, tp) for one in kinds), default=0.0)
    masked = model.hidden_dropout > 0.0 and not asked.precision.compiles(on_gpu=asked.on_gpu)
    if stage.has_embedding and masked:
        kept += stream / low  # the mask
    if not stage.has_head:
        backward = _Moment(0.0, blocks.again, 0.0, workspace, whole.in_blocks(blocks.kept))
        return _Held(kept, deferred, (_Moment(whole=whole.forward),), (backward,))
    head = head_of(blueprint, asked)
    return _Held(
        kept + head.norm + head.kept,
        deferred,
        (
            _Moment(-head.kept - head.norm, whole=whole.arriving),
            _Moment(-head.kept, logits=head.forward, whole=whole.forward),
        ),
        # the head's backward; then the blocks', when the head's and the final norm's are free
        (
            _Moment(-head.kept, logits=head.backward, whole=whole.head),
            _Moment(
                -head.kept - head.norm, blocks.again, 0.0, workspace, whole.in_blocks(blocks.kept)
            ),
        ),
    )


def head_of(blueprint: Blueprint, asked: PlanInputs) -> HeadBytes:
    """Of the last stage's end."""
    return head_bytes(
        blueprint, asked.parallel, asked.precision, micro_batch_size=asked.micro_batch_size,
        on_gpu=asked.on_gpu, passing=_passing(asked),
    )  # fmt: skip


def _passing(asked: PlanInputs) -> float:
    """Bytes per weight of a product of its gradient on its way into the accumulator.

    A 16-bit one exists before it is added to an fp32 sum, but where the product adds by itself
    (kernels/products.py).
    """
    low = element_bytes(asked.precision)
    adds_by_itself = asked.on_gpu and asked.precision.gradient_accumulation_fusion
    in_fp32 = asked.parallel.accumulate_allreduce_grads_in_fp32
    return float(low) if low == 2 and in_fp32 and not adds_by_itself else 0.0


def largest_matrix(layer: Parts, tp: int) -> float:
    """Elements of a layer's largest weight that is trained on one rank, q|k|v and gate|up being one each."""
    trained = (matrix.size / tp for matrix in layer.of(Matrix) if not matrix.frozen)
    return max(trained, default=0.0)


def largest_packed(layer: Parts, tp: int) -> float:
    """Elements of the largest weight that is unpacked for a product on one rank."""
    packed = (matrix.size / tp for matrix in layer.of(Matrix) if matrix.storage == "nf4")
    return max(packed, default=0.0)


def _mask_bytes(model: ModelConfig, asked: PlanInputs) -> float:
    if not asked.segments:
        return 0.0
    return shared_mask_bytes(
        model, asked.parallel, asked.precision,
        micro_batch_size=asked.micro_batch_size, on_gpu=asked.on_gpu,
    )  # fmt: skip


def stage_waiting(blueprint: Blueprint, asked: PlanInputs, pp_rank: int) -> dict[int, float]:
    """Stage of the rank -> bytes that a micro batch keeps there between I and W."""
    model = blueprint.model

    def deferred(layer: Parts) -> float:
        return deferred_wgrad_bytes(
            layer, model, asked.parallel, asked.precision, micro_batch_size=asked.micro_batch_size
        )

    waiting = {}
    for stage in blueprint.stages_of(pp_rank):
        waiting[stage.index] = blueprint.figure.total(deferred, stage.layers)
        if blueprint.draw is not None:
            each = (deferred(blueprint.figure.layers[number]) for number in stage.layers)
            waiting[stage.index] = sum(heapq.nlargest(blueprint.draw.drawn, each))
        if stage.has_head:
            waiting[stage.index] += head_of(blueprint, asked).waiting
    return waiting


def _worst(schedule: Schedule, pp_rank: int, held: Mapping[int, _Held]) -> _Moment:
    """The moment of a rank's actions that holds most."""
    live, deferred = dict.fromkeys(held, 0), dict.fromkeys(held, 0)
    totals = {id(m): m.total for of in held.values() for m in (*of.forward, *of.backward)}
    now, most, worst, below, together = 0.0, 0.0, _Moment(), 0.0, dict(live)
    for op, stage, _ in schedule.lists[pp_rank]:
        of = held[stage]
        if op is Op.F:
            live[stage] += 1
            now += of.kept
            moments = of.forward
        elif op is Op.W:
            deferred[stage] -= 1
            now -= of.deferred
            continue
        else:
            moments = of.backward
        for moment in moments:
            if now + totals[id(moment)] > most:
                most, worst, below = now + totals[id(moment)], moment, now
                together = {s: live[s] + deferred[s] for s in live}
        if op is not Op.F:
            live[stage] -= 1
            now -= of.kept
            if op is Op.I:
                deferred[stage] += 1
                now += of.deferred
    return replace(worst, activations=below + worst.activations, live=together)
