"""The cheapest change that makes a run fit, and warnings."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.param_groups import optimizers_asked_for
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.space import LayoutVariant

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal by arXiv:2203.15556 (Chinchilla), approach 1 and 2 at the scale of 70B."""


class Change(NamedTuple):
    """Flags to add or change, and the forecast with them."""

    flags: str
    forecast: Forecast


def cheapest(plan: Forecast, variant: LayoutVariant) -> Change | None:
    """Of the changes that make it fit on the same devices, the one that costs the least time.

    State goes to the host where nothing else makes it fit.
    """
    start = plan.asked.parallel
    fitting = _fitting(plan, variant, start)
    if (
        not fitting
        and not start.on_host
        and "apex-adam" not in optimizers_asked_for(plan.blueprint.optim)
    ):
        there = dataclasses.replace(start, optimizer_cpu_offload=True)
        fitting = _fitting(plan, variant, there)
    if not fitting:
        return None
    best = min(fitting, key=lambda change: change.forecast.rates.step_seconds)
    # closed forms choose, the simulation says how long it takes
    seen_again = forecast(best.forecast.blueprint, best.forecast.asked, plan.cluster)
    return Change(best.flags, seen_again)


def _fitting(plan: Forecast, variant: LayoutVariant, start: ParallelConfig) -> list[Change]:
    """Changes that begin with a layout and fit."""
    fitting = []
    seen = set()
    for parallel, micro_batch_size in _changes(plan, start):
        flags = _flags(plan, parallel, micro_batch_size)
        if not flags or flags in seen:
            continue
        seen.add(flags)
        try:
            blueprint = variant(parallel, micro_batch_size)
        except ConfigError:
            continue
        asked = dataclasses.replace(
            plan.asked, parallel=parallel, micro_batch_size=micro_batch_size
        )
        tried = forecast(blueprint, asked, plan.cluster, simulated=False)
        if tried.fits:
            fitting.append(Change(flags, tried))
    return fitting


def _changes(plan: Forecast, start: ParallelConfig) -> Iterator[tuple[ParallelConfig, int]]:
    """Single changes and their combinations, on the same number of devices."""
    micro_batch_size = plan.asked.micro_batch_size
    for sized in (micro_batch_size, *(b for b in (1, 2, 4) if b < micro_batch_size)):
        for layout in _layouts(plan, start):
            for recomputed in _recomputed(layout):
                yield recomputed, sized


def _layouts(plan: Forecast, start: ParallelConfig) -> Iterator[ParallelConfig]:
    grid = plan.blueprint.grid
    sizes = {(start.tp, start.pp)}
    for tp in (start.tp, start.tp * 2, start.tp * 4, start.tp * 8):
        for pp in (start.pp, start.pp * 2, start.pp * 4):
            if tp <= plan.cluster.devices_per_node and grid.world_size % (tp * pp * start.cp) == 0:
                sizes.add((tp, pp))
    for tp, pp in sorted(sizes):
        yield dataclasses.replace(
            start,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=start.sequence_parallel,
        )
        yield dataclasses.replace(
            start,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=tp > 1,
            zero_stage=1 if grid.world_size > tp * pp * start.cp else 0,
        )


def _recomputed(layout: ParallelConfig) -> Iterator[ParallelConfig]:
    yield layout
    if layout.recompute_granularity is None:
        yield dataclasses.replace(layout, recompute_granularity="selective")
    if layout.recompute_granularity != "full":
        yield dataclasses.replace(
            layout,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        )


def layout_flags(parallel: ParallelConfig, micro_batch_size: int) -> str:
    """The flags that say all of this layout: behind a model's they give its plan."""
    flags = [
        f"--tensor-model-parallel-size {parallel.tp}",
        f"--pipeline-model-parallel-size {parallel.pp}",
        f"--micro-batch-size {micro_batch_size}",
    ]
    flags += [f"{flag} {value}" for flag, value in _stages(parallel).items() if value is not None]
    stage = parallel.zero_stage
    on = {
        "--account-for-embedding-in-pipeline-split": parallel.account_for_embedding_in_pipeline_split,
        "--account-for-loss-in-pipeline-split": parallel.account_for_loss_in_pipeline_split,
        "--sequence-parallel": parallel.splits_sequence,
        "--use-distributed-optimizer": stage == 1,
        f"--zero-stage {stage}": stage > 1,
        "--overlap-param-gather": parallel.overlap_param_gather,
        "--optimizer-cpu-offload": parallel.optimizer_cpu_offload,
        f"--optimizer-offload-fraction {parallel.on_host:g}": 0.0 < parallel.on_host < 1.0,
    }
    flags += [flag for flag, asked in on.items() if asked]
    if parallel.recompute_granularity == "selective":
        flags.append("--recompute-granularity selective")
        if parallel.recompute_modules != ["core_attn"]:
            flags.append(f"--recompute-modules {' '.join(parallel.recompute_modules)}")
    if parallel.recompute_granularity == "full":
        flags.append(
            f"--recompute-granularity full --recompute-method {parallel.recompute_method} "
            f"--recompute-num-layers {parallel.recompute_num_layers}"
        )
        if parallel.distribute_saved_activations:
            flags.append("--distribute-saved-activations")
    return " ".join(flags)


def _stages(parallel: ParallelConfig) -> dict[str, object]:
    """How layers are dealt to stages, and in which order these work."""
    layout = parallel.pipeline_model_parallel_layout
    return {
        "--num-virtual-stages-per-pipeline-rank": parallel.num_virtual_stages_per_pipeline_rank,
        "--num-layers-per-virtual-pipeline-stage": parallel.num_layers_per_virtual_pipeline_stage,
        "--pipeline-model-parallel-layout": None if layout is None else shlex.quote(layout),
        "--decoder-first-pipeline-num-layers": parallel.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": parallel.decoder_last_pipeline_num_layers,
        "--pipeline-schedule": parallel.pipeline_schedule,
    }


def _flags(plan: Forecast, parallel: ParallelConfig, micro_batch_size: int) -> str:
    """What changes against the plan; empty where nothing does."""
    before = layout_flags(plan.asked.parallel, plan.asked.micro_batch_size).split(" --")
    after = layout_flags(parallel, micro_batch_size).split(" --")
    had = {part.removeprefix("--") for part in before}
    return " ".join(f"--{p}" for p in (x.removeprefix("--") for x in after) if p not in had)


def warnings(plan: Forecast, tokens: float | None, *, begins: bool) -> list[str]:
    """What is unusual about a run, in words.  begins: whether it learns from nothing."""
    found = []
    rates, grid = plan.rates, plan.blueprint.grid
    if rates.mfu_causal > 0.65:
        found.append(
            f"MFU {rates.mfu_causal:.0%} (causal) is above what any published 16-bit run reaches (about 65 %); "
            "check the hardware and the measured time"
        )
    if grid.tp > plan.cluster.devices_per_node:
        found.append(
            f"--tensor-model-parallel-size {grid.tp} leaves nodes of "
            f"{plan.cluster.devices_per_node}: its all-reduces go over the network"
        )
    if tokens and begins:
        found += tokens_warning(tokens / plan.blueprint.num_parameters)
    return found


def tokens_warning(ratio: float) -> list[str]:
    """One where a run has few or very many tokens per parameter."""
    if ratio < TOKENS_PER_PARAMETER / 2:
        return [
            f"{ratio:.1f} tokens per parameter: a smaller model trained longer reaches a lower "
            f"loss for the same FLOPs (compute-optimal is about {TOKENS_PER_PARAMETER:.0f})"
        ]
    if ratio > TOKENS_PER_PARAMETER * 20:
        return [
            f"{ratio:.0f} tokens per parameter is far beyond compute-optimal (about "
            f"{TOKENS_PER_PARAMETER:.0f}): cheap to serve, dear to train"
        ]
    return []
