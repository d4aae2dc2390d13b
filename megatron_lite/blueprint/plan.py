"""A Blueprint in words, for --dry-run: what would run, before anything does."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.param_groups import group_lines
from megatron_lite.blueprint.schedules.simulate import simulate
from megatron_lite.blueprint.stage_cost import flops_cost
from megatron_lite.blueprint.stages import StageLayers
from megatron_lite.config.sections.optim import LearningRateConfig

_PHASES_SHOWN = 6


def describe(
    blueprint: Blueprint, rates: LearningRateConfig | None = None, *, zero_stage: int = 0
) -> str:
    """The plan as lines of `topic   facts`: grid, parameters, batches, schedule, FLOPs, notes."""
    groups = group_lines(blueprint.optim, rates, blueprint.parameters)
    topics = [
        ("grid", _grid(blueprint)),
        ("shared", _shared(blueprint, zero_stage)),
        ("model", _model(blueprint)),
        ("parameters", _parameters(blueprint)),
        ("groups", iter(groups)),
        ("batch", _batch(blueprint)),
        ("length", _length(blueprint)),
        ("schedule", _schedule(blueprint)),
        ("FLOPs", _flops(blueprint)),
        ("note", iter(blueprint.notes)),
    ]
    world = blueprint.grid.world_size
    lines = [f"plan for {world} rank{'s' if world > 1 else ''}"]
    for topic, facts in topics:
        for n, fact in enumerate(facts):
            lines.append(f"  {topic if n == 0 else '':<12}{fact}")
    return "\n".join(lines)


def _grid(blueprint: Blueprint) -> Iterator[str]:
    grid = blueprint.grid
    yield (
        f"tp {grid.tp} x cp {grid.cp} x dp {grid.dp} x pp {grid.pp} = {grid.world_size} ranks, "
        f"numbered {grid.order} (first varies fastest)"
    )


_SHARED = ("masters and optimizer state", "gradients", "weights")
"""By the stages of ZeRO, each of which shares what those before it do."""


def _shared(blueprint: Blueprint, zero_stage: int) -> Iterator[str]:
    if zero_stage and blueprint.replicas > 1:
        what = ", ".join(_SHARED[:zero_stage])
        yield f"{what}: 1/{blueprint.replicas} on each rank of dp (--zero-stage {zero_stage})"


def _model(blueprint: Blueprint) -> Iterator[str]:
    m = blueprint.model
    yield (
        f"{m.num_layers} layers, hidden {m.hidden_size}, {m.num_attention_heads} heads of "
        f"{m.head_size} ({m.num_kv_heads} for keys and values), feed-forward {m.ffn_size}, "
        f"sequence {m.seq_length}"
    )
    yield (
        f"vocabulary {blueprint.vocab_size:,} padded to {blueprint.padded_vocab_size:,}, "
        f"a multiple of {m.make_vocab_size_divisible_by} x tp {blueprint.grid.tp}"
    )


def _parameters(blueprint: Blueprint) -> Iterator[str]:
    yield f"{blueprint.num_parameters:,} in all"
    if blueprint.num_trained < blueprint.num_parameters:
        share = blueprint.num_trained / blueprint.num_parameters
        yield f"{blueprint.num_trained:,} of them are trained ({share:.2%}), the others frozen"
    for pp_rank in range(blueprint.grid.pp):
        stages = "; ".join(_stage(stage) for stage in blueprint.stages_of(pp_rank))
        yield f"{blueprint.held(pp_rank).parameters:,} per rank of pp {pp_rank}: {stages}"


def _stage(stage: StageLayers) -> str:
    many = len(stage.layers) > 1
    layers = f"layer{'s' * many} {stage.layers[0]}" if stage.layers else "no layers"
    layers += f"-{stage.layers[-1]}" if many else ""
    before = "embedding, " if stage.has_embedding else ""
    return f"stage {stage.index} with {before}{layers}{', head' if stage.has_head else ''}"


def _batch(blueprint: Blueprint) -> Iterator[str]:
    batches, seq = blueprint.batch_schedule, blueprint.model.seq_length
    size = batches.final_batch_size
    yield (
        f"{size:,} sequences per step = {blueprint.microbatches():,} micro batches x "
        f"{batches.micro_batch_size} x dp {batches.dp}; {size * seq:,} tokens per step"
    )
    phases = batches.phases()
    if len(phases) > 1:
        shown = phases if len(phases) <= _PHASES_SHOWN else (*phases[:3], *phases[-2:])
        steps = [
            f"{p.global_batch_size:,} from iteration {p.iteration:,} (sample {p.samples:,})"
            for p in shown
        ]
        if len(shown) < len(phases):
            steps.insert(3, f"{len(phases) - len(shown)} sizes between")
        yield "ramp: " + ", ".join(steps)


def _length(blueprint: Blueprint) -> Iterator[str]:
    if blueprint.train_iters is None or blueprint.train_samples is None:
        yield "not known (--train-iters, --train-samples or --train-epochs)"
        return
    tokens = blueprint.train_samples * blueprint.model.seq_length
    yield (
        f"{blueprint.train_iters:,} iterations = {blueprint.train_samples:,} samples "
        f"= {tokens:,} tokens"
    )


def _schedule(blueprint: Blueprint) -> Iterator[str]:
    schedule = blueprint.compute(blueprint.microbatches())
    result = simulate(schedule)
    live = " ".join(map(str, result.peak_live))
    chunks = len(blueprint.placement) // blueprint.grid.pp
    per_rank = f" with {chunks} stages per rank" if chunks > 1 else ""
    each = " (each of one stage)" if chunks > 1 else ""
    yield (
        f"{blueprint.schedule}{per_rank}, bubble {result.bubble:.2%} of the step; "
        f"micro batches{each} kept at once per pp rank: {live}"
    )
    if blueprint.grid.pp > 1:
        cost = flops_cost(blueprint.figure, blueprint.stages, blueprint.model.seq_length)
        yield f"bubble {simulate(schedule, cost).bubble:.2%} if stages take the time of their FLOPs"
    every = blueprint.curvature_interval
    if every:
        fraction = blueprint.optim.sophia_hessian_fraction
        part = "" if fraction == 1.0 else f" over {fraction:g} of its micro batches"
        yield (
            f"each {every}. step, the first included, runs forward and backward once more{part} to "
            f"observe curvature: {fraction / every:.1%} more of both"
        )


def _flops(blueprint: Blueprint) -> Iterator[str]:
    per_step = blueprint.batch_schedule.final_batch_size * blueprint.model.seq_length
    apart = ", without the passes for curvature" if blueprint.curvature_interval else ""
    for convention, per_token in (
        ("full attention square (SC21, Megatron-DeepSpeed)", blueprint.flops_per_token_full),
        ("causal half of attention (Megatron-LM)", blueprint.flops_per_token_causal),
    ):
        yield f"{per_token * per_step:.4e} per step, {per_token:.4e} per token: {convention}{apart}"
