"""Bytes on each pipeline rank by kind, and whether they fit.

static     weights + gradients + masters + moments        every moment of the step
activity   activations at the schedule's worst moment + logits + what one backward needs
around     message buffers, the device's own context, allowance for fragmentation
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.schedules.actions import Op, Schedule
from megatron_lite.blueprint.stages import Stage
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optim import OptimConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.precision import PrecisionConfig
from megatron_lite.planner.activations import (
    Items,
    block_items,
    element_bytes,
    postponed_bytes,
    stage_bytes,
)

CONTEXT_BYTES = 1.5e9
"""CUDA context, libraries and NCCL's channels, which torch does not count; about 1 to 2 GB."""

FRAGMENTATION = 0.05
"""Allowance: share of what is allocated that the caching allocator holds but cannot use."""

_MOMENTS = {"adam": 2, "sgd": 1}


@dataclass(frozen=True, slots=True)
class Asked:
    """The sections of a config that decide memory and time beside the Blueprint."""

    parallel: ParallelConfig
    precision: PrecisionConfig
    optim: OptimConfig
    micro_batch_size: int
    on_gpu: bool = True


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of any rank of one pipeline rank, by kind, in the order of `kinds`."""

    pp_rank: int
    kinds: Mapping[str, float]
    parameters: int
    layers: tuple[int, ...]
    live: Mapping[int, int]
    """Stage -> micro batches it keeps at the worst moment."""

    @property
    def allocated(self) -> float:
        """What the framework allocates at the worst moment: comparable with max_memory_allocated."""
        outside = ("context", "fragmentation")
        return sum(b for kind, b in self.kinds.items() if kind not in outside)

    @property
    def total(self) -> float:
        """What the device must hold."""
        return sum(self.kinds.values())


def memory(blueprint: Blueprint, asked: Asked) -> tuple[RankMemory, ...]:
    """The memory of each pipeline rank once the batch has its full size."""
    batches = blueprint.batch_schedule
    schedule = blueprint.compute(
        peak_microbatches(
            blueprint, batches.final_batch_size // (batches.micro_batch_size * batches.dp)
        )
    )
    items = block_items(
        blueprint.model,
        asked.parallel,
        asked.precision,
        micro_batch_size=asked.micro_batch_size,
        on_gpu=asked.on_gpu,
    )
    return tuple(
        _rank_memory(blueprint, asked, schedule, items, pp_rank)
        for pp_rank in range(blueprint.grid.pp)
    )


def peak_microbatches(blueprint: Blueprint, num_microbatches: int) -> int:
    """A number of micro batches that shows the schedule's worst moment, not more than there are.

    Every schedule but gpipe reaches it in its steady phase, which begins within 2 pp.
    """
    if blueprint.schedule == "gpipe":
        return num_microbatches
    pp = blueprint.grid.pp
    return min(num_microbatches, 3 * pp)


def static_bytes(parameters: float, asked: Asked, dp: int) -> dict[str, float]:
    """Weights, gradients, masters and moments of so many parameters on a rank."""
    low = element_bytes(asked.precision)
    in_fp32 = asked.parallel.accumulate_allreduce_grads_in_fp32
    shared = dp if asked.parallel.use_distributed_optimizer else 1
    return {
        "weights": parameters * low,
        "gradients": parameters * (4 if in_fp32 else low),
        "masters": 0.0 if low == 4 else parameters * 4 / shared,
        "moments": parameters * 4 * _MOMENTS[asked.optim.optimizer] / shared,
    }


def layer_input_bytes(model: ModelConfig, asked: Asked) -> float:
    """The residual stream of a micro batch between two layers on one rank."""
    parallel = asked.parallel
    tokens = model.seq_length * asked.micro_batch_size / parallel.cp
    split = parallel.tp if parallel.sequence_parallel else 1
    return tokens * model.hidden_size * element_bytes(asked.precision) / split


def _rank_memory(
    blueprint: Blueprint, asked: Asked, schedule: Schedule, items: Items, pp_rank: int
) -> RankMemory:
    model, stages = blueprint.model, blueprint.stages_of(pp_rank)
    parameters = blueprint.rank_parameters(pp_rank)
    stream = layer_input_bytes(model, asked)
    kept, waiting, transient = {}, stage_waiting(blueprint, asked, pp_rank), 0.0
    for stage in stages:
        kept[stage.index], again = stage_bytes(
            len(stage.layers), items, asked.parallel, layer_input=stream
        )
        kept[stage.index] += _ends_bytes(model, stage, asked, stream)
        transient = max(transient, again)
    peak, live = _peak(schedule, pp_rank, kept, waiting)
    low = element_bytes(asked.precision)
    kinds = static_bytes(parameters, asked, blueprint.dp)
    kinds["activations"] = peak
    kinds["recomputed"] = transient
    kinds["logits"] = 0.0
    if any(stage.has_head for stage in stages):
        kinds["logits"] = _logits_bytes(blueprint, asked)
    # the product of a weight's gradient before it is added to the accumulator, and dx beside dy
    backward = 2 * stream + (_largest_weight(blueprint, pp_rank) * low if low == 2 else 0.0)
    kinds["workspace"] = backward
    kinds["communication"] = 4 * stream if blueprint.grid.pp > 1 else 0.0
    kinds["context"] = CONTEXT_BYTES if asked.on_gpu else 0.0
    kinds["fragmentation"] = FRAGMENTATION * sum(kinds.values()) if asked.on_gpu else 0.0
    layers = tuple(n for stage in stages for n in stage.layers)
    return RankMemory(pp_rank, kinds, parameters, layers, live)


def _ends_bytes(model: ModelConfig, stage: Stage, asked: Asked, stream: float) -> float:
    """What the embedding and the final norm keep per micro batch."""
    kept = 0.0
    if stage.has_embedding and model.hidden_dropout > 0.0:
        kept += stream / element_bytes(asked.precision)  # the mask
    if stage.has_head:
        kept += 2 * stream  # the final norm's input and output
    return kept


def _logits_bytes(blueprint: Blueprint, asked: Asked) -> float:
    """Logits and their fp32 log probabilities on one rank; freed before the next micro batch."""
    model, parallel = blueprint.model, asked.parallel
    tokens = model.seq_length * asked.micro_batch_size / parallel.cp
    columns = blueprint.padded_vocab_size / parallel.tp
    return tokens * columns * (4 + element_bytes(asked.precision))


def stage_waiting(blueprint: Blueprint, asked: Asked, pp_rank: int) -> dict[int, float]:
    """Stage of the rank -> bytes that a micro batch keeps there between I and W."""
    model = blueprint.model
    block = postponed_bytes(
        model, asked.parallel, asked.precision, micro_batch_size=asked.micro_batch_size
    )
    waiting = {}
    for stage in blueprint.stages_of(pp_rank):
        waiting[stage.index] = len(stage.layers) * block
        if stage.has_head:
            waiting[stage.index] += layer_input_bytes(model, asked)
            waiting[stage.index] += _logits_gradient_bytes(blueprint, asked)
    return waiting


def _logits_gradient_bytes(blueprint: Blueprint, asked: Asked) -> float:
    """The factor that a postponed product of the head keeps beside its input."""
    tokens = blueprint.model.seq_length * asked.micro_batch_size / asked.parallel.cp
    columns = blueprint.padded_vocab_size / asked.parallel.tp
    return tokens * columns * element_bytes(asked.precision)


def _largest_weight(blueprint: Blueprint, pp_rank: int) -> int:
    held = {stage.index for stage in blueprint.stages_of(pp_rank)}
    tp = blueprint.grid.tp
    return max((s.local_size(tp) for s in blueprint.parameters if s.stage in held), default=0)


def _peak(
    schedule: Schedule, pp_rank: int, kept: Mapping[int, float], waiting: Mapping[int, float]
) -> tuple[float, dict[int, int]]:
    """Bytes at the worst moment, and the micro batches of each stage alive then.

    kept: of a stage's micro batch from its forward to B or I; waiting: from I to W.
    """
    between_f_and_i, between_i_and_w = dict.fromkeys(kept, 0), dict.fromkeys(kept, 0)
    worst, at_worst = 0.0, dict(between_f_and_i)
    for op, stage, _ in schedule.lists[pp_rank]:
        between_f_and_i[stage] += (op is Op.F) - (op is Op.B or op is Op.I)
        between_i_and_w[stage] += (op is Op.I) - (op is Op.W)
        now = sum(between_f_and_i[s] * kept[s] + between_i_and_w[s] * waiting[s] for s in kept)
        if now > worst:
            worst = now
            at_worst = {s: between_f_and_i[s] + between_i_and_w[s] for s in kept}
    return worst, at_worst
