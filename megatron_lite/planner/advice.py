"""The cheapest changes that make a run fit, and warnings."""

from __future__ import annotations

import dataclasses
import shlex
from typing import NamedTuple

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.param_groups import optimizers_asked_for
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.planner.forecast import Forecast
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.planner.search import search
from megatron_lite.planner.space import (
    DEALING,
    RECOMPUTE,
    SEARCHED,
    SHARDING,
    SIZES,
    LayoutVariant,
)

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal by arXiv:2203.15556 (Chinchilla), approach 1 and 2 at the scale of 70B."""


class Change(NamedTuple):
    """Flags to add or change, those to leave out, and the forecast then."""

    flags: str
    without: str
    forecast: Forecast


_FREE = (RECOMPUTE, SHARDING, SIZES | DEALING, SEARCHED)
"""What may change together: one thing alone, which leaves the rest of a run as it is, or everything."""


def cheapest_changes(plan: Forecast, variant: LayoutVariant) -> list[Change]:
    """Those that make it fit on the same devices: the fastest of each kind, the cheapest in time first.

    The optimizer's state on the host is a kind; beside others where nothing else makes it fit.
    """
    found: dict[str, Change] = {}
    start, most = plan.asked.parallel, plan.asked.micro_batch_size

    def near(layout: ParallelConfig, micro_batch_size: int) -> bool:
        """tp to eight times, pp to four times as large, no larger micro batch: --search knows all others."""
        wider, deeper = layout.tp / start.tp, layout.pp / start.pp
        return micro_batch_size <= most and wider in (0.5, 1, 2, 4, 8) and deeper in (0.5, 1, 2, 4)

    def fitting(asked: PlanInputs, free: frozenset[str]) -> None:
        try:
            best = search(
                variant, asked, plan.cluster, model=plan.blueprint.model,
                fixed={name: name for name in SEARCHED - free}, top=1, among=near,
            ).ranked  # fmt: skip
        except ConfigError:  # no rule allows the rest as it is
            return
        for change in (_change(plan, then) for then in best):
            if change.flags or change.without:
                found.setdefault(f"{change.flags} {change.without}", change)

    for free in _FREE:
        fitting(plan.asked, free)
    if not start.on_host and "apex-adam" not in optimizers_asked_for(plan.blueprint.optim):
        there = dataclasses.replace(start, optimizer_cpu_offload=True)
        on_host = dataclasses.replace(plan.asked, parallel=there)
        for free in (frozenset[str](),) if found else (frozenset[str](), *_FREE):
            fitting(on_host, free)
    return sorted(found.values(), key=lambda change: change.forecast.rates.step_seconds)


_IMPLIED = ("1f1b", "interleaved")
"""Schedules that follow from the number of virtual stages."""


def _change(plan: Forecast, then: Forecast) -> Change:
    before, after = (
        layout_flags(one.asked.parallel, one.asked.micro_batch_size).removeprefix("--").split(" --")
        for one in (plan, then)
    )
    names = {flag.partition(" ")[0] for flag in after}
    if plan.asked.parallel.pipeline_schedule is None and then.blueprint.schedule in _IMPLIED:
        after = [flag for flag in after if not flag.startswith("pipeline-schedule ")]
    return Change(
        " ".join(f"--{flag}" for flag in after if flag not in before),
        " ".join(f"--{name}" for flag in before if (name := flag.partition(" ")[0]) not in names),
        then,
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
    if parallel.recompute_granularity is not None:
        flags.append(recompute_flags(parallel))
    return " ".join(flags)


def recompute_flags(parallel: ParallelConfig) -> str:
    """Those of what is recomputed."""
    if parallel.recompute_granularity == "selective":
        flags = "--recompute-granularity selective"
        modules = parallel.recompute_modules
        return (
            flags
            if modules == ["core_attn"]
            else f"{flags} --recompute-modules {' '.join(modules)}"
        )
    flags = (
        f"--recompute-granularity full --recompute-method {parallel.recompute_method} "
        f"--recompute-num-layers {parallel.recompute_num_layers}"
    )
    return flags + " --distribute-saved-activations" * parallel.distribute_saved_activations


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
