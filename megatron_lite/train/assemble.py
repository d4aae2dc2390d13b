"""Config + Blueprint -> Run: the only place where everything meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.logits import LogitsBudget
from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.engines.base import Engine, Statistics
from megatron_lite.engines.table import ENGINES
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.layers.choosing import require_known, require_used
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.gradients import WeightGradients
from megatron_lite.models.adapters import begin_magnitudes
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.initialise import initialise
from megatron_lite.models.packing import Packed, in_turn, packed_weights
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import LocalParameter
from megatron_lite.pipeline.executor import Executor
from megatron_lite.pipeline.mail import Mail
from megatron_lite.pipeline.stage import Stage
from megatron_lite.train import ahead
from megatron_lite.train.curvature import add_curvature
from megatron_lite.train.health.guards import guards_for
from megatron_lite.train.measuring.timing import RunTimers
from megatron_lite.train.objectives.promises import make_objective, scorer
from megatron_lite.train.run import Run

_REHEARSED = (9, 0)
"""What kernels are chosen for where a rehearsal stands for a GPU."""


def assemble(
    config: RunConfig,
    blueprint: Blueprint,
    ctx: ParallelContext,
    *,
    timers: RunTimers | None = None,
    compiler: Compiler | None = None,
) -> Run:
    """Build this rank's stages, engine and executor; weights are filled from seed and names.

    The engine is made before the weights are filled, so that it may say where they lie.
    compiler: of what stands between two products, the default one where the config wants it.
    Collective only in that all ranks must build alike; it communicates nothing but lengths of rows (dora).
    """
    timers = timers or RunTimers(level=0)
    require_known(config.precision.kernel)
    if not config.precision.compiles(on_gpu=ctx.device.type == "cuda"):
        compiler = None
    else:
        compiler = compiler or Compiler()
    decoders = _decoders(config, blueprint, ctx, timers, compiler)
    parameters = {stage: local_parameters(decoder) for stage, decoder in decoders.items()}
    held = _engine(config, blueprint, ctx, parameters, timers)
    for decoder in decoders.values():
        decoder.hook_layers(held.layer_hooks)
    packed = [one for decoder in decoders.values() for one in packed_weights(decoder)]
    _initialise(config, blueprint, held, packed)
    for decoder in decoders.values():
        begin_magnitudes(decoder)
        if config.precision.gradient_accumulation_fusion:
            decoder.context.gradients.attach(held.accumulators(), held.ready)
        if config.parallel.overlap_param_gather:
            _wait_before_use(decoder, held)
    context = list(decoders.values())[-1].context
    objective = make_objective(config.train.objective, context)
    ops = {line.partition(":")[0] for d in decoders.values() for line in d.context.kernels}
    require_used(config.precision.kernel, ops, all_stages=blueprint.grid.pp == 1)
    stages = {
        index: Stage(
            index=index,
            module=decoder,
            is_first=decoder.has_embedding,
            is_last=decoder.has_head,
            score=scorer(objective),
            gradients=decoder.context.gradients,
            carrier=held,
        )
        for index, decoder in decoders.items()
    }
    reasons = ahead.waits_because(config, held) if ctx.device.type in ahead.BESIDE_THE_HOST else ()
    slowing = next(iter(decoders.values())).rotary
    run = Run(
        blueprint=blueprint,
        ctx=ctx,
        context=context,
        objective=objective,
        pipeline=Executor(
            stages, Mail(ctx.pp, blueprint.placement), held.begin_last_backward, timers.span
        ),
        engine=held,
        parameters=[local for stage in parameters.values() for local in stage],
        packed=packed,
        timers=timers,
        guards=guards_for(config.guards, held.scaler, fp16=config.precision.fp16),
        runs_ahead=ctx.device.type in ahead.BESIDE_THE_HOST and not reasons,
        waits_because=reasons,
    )
    if slowing is not None:
        run.late_gradients = slowing.finish
    add_curvature(run, config)
    return run


def _engine(
    config: RunConfig,
    blueprint: Blueprint,
    ctx: ParallelContext,
    parameters: Mapping[int, Sequence[LocalParameter]],
    timers: RunTimers,
) -> Engine:
    return ENGINES[config.parallel.engine](
        parameters,
        ctx,
        optim=config.optim,
        parallel=config.parallel,
        precision=config.precision,
        statistics=Statistics(
            num_zeros=config.telemetry.log_num_zeros_in_grad,
            params_norm=config.telemetry.log_params_norm,
        ),
        draw=blueprint.draw,
        span=timers.span,
    )


def _initialise(
    config: RunConfig, blueprint: Blueprint, held: Engine, packed: Sequence[Packed]
) -> None:
    """First values of all weights."""
    tensors = [spec.tensor for spec in blueprint.parameters]
    begin = partial(initialise, tensors=tensors, model=config.model, seed=config.train.seed)
    held.fill(begin)
    for slices in in_turn(packed):
        begin(slices)


def _decoders(
    config: RunConfig,
    blueprint: Blueprint,
    ctx: ParallelContext,
    timers: RunTimers,
    compiler: Compiler | None,
) -> dict[int, Decoder]:
    """The modules of this rank's stages, by stage; their parameters are not filled."""
    assert config.model.vocab_size is not None, "the tool reads it from the tokenizer"
    made: dict[int, Decoder] = {}
    first: Decoder | None = None
    for placed in blueprint.stages_of(ctx.pp.rank):
        context = StageContext(
            model=config.model,
            ctx=ctx,
            padded_vocab_size=blueprint.padded_vocab_size,
            vocab_size=config.model.vocab_size,
            precision=config.precision,
            sequence_parallel=config.parallel.splits_sequence,
            seed=config.train.seed,
            gradients=WeightGradients(span=timers.span),
            recompute=RecomputePlan.from_config(config.parallel),
            logits_budget=LogitsBudget.from_config(config.parallel, blueprint.schedule),
            drawn=blueprint.figure,
            capability=_REHEARSED
            if ctx.device.type == "meta" and not config.train.use_cpu
            else None,
            compiler=compiler,
            neftune_alpha=config.train.neftune_alpha,
            engine_gives_memory=config.parallel.shares_weights
            and getattr(ENGINES[config.parallel.engine], "gives_memory", False),
        )
        decoder = made[placed.index] = Decoder(
            context,
            placed.layers,
            has_embedding=placed.has_embedding,
            has_head=placed.has_head,
            lender=first,
        )
        first = first or decoder
    return made


def _wait_before_use(decoder: Decoder, engine: Engine) -> None:
    """Have every module ask for its own parameters before its forward (--overlap-param-gather)."""
    for module in decoder.modules():
        own = list(module.parameters(recurse=False))
        if own:
            module.register_forward_pre_hook(_waits_for(engine, own))
    if decoder.has_head:
        # the decoder multiplies with the head's matrix (or the tied table) after the final norm
        waits = _waits_for(engine, [decoder.output_weight])
        decoder.final_norm.register_forward_pre_hook(waits)


def _waits_for(engine: Engine, own: list[nn.Parameter]) -> Callable[..., None]:
    def wait(module: nn.Module, arguments: object) -> None:
        engine.wait_for(own)

    return wait
