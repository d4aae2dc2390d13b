"""All layouts of a run that fit its machines, ranked by predicted step time.

Closed forms look at every layout; the best few are then simulated event by event, and their
order is the simulation's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, Literal

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.planner.advice import LayoutVariant
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.hardware import Cluster
from megatron_lite.planner.memory import PlanInputs, memory, static_total

Name = Literal["1f1b", "interleaved", "zb-h1", "zb-v"]
Granularity = Literal["full", "selective"]
Method = Literal["uniform", "block"]

MICRO_BATCHES = (1, 2, 4, 8, 16)
_SIMULATED = 24


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search looked at; `ranked` fits, the first `num_simulated` by simulation."""

    ranked: tuple[Forecast, ...]
    num_simulated: int
    num_too_large: int
    num_forbidden: int
    closest: Forecast | None
    """Where nothing fits: the layout that misses by least."""


_STAGES = frozenset((
    "pipeline_schedule", "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
))  # fmt: skip
_RECOMPUTE = frozenset((
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
))  # fmt: skip
SEARCHED = _STAGES | _RECOMPUTE | {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
    "zero_stage", "overlap_param_gather", "micro_batch_size",
}  # fmt: skip
"""What a search chooses where it is not fixed."""


def said(origin: Mapping[str, str]) -> dict[str, str]:
    """Of what a search chooses, what flags or files have said: the field's name -> its flag."""
    return {
        key.partition(".")[2]: settings()[key].flag
        for key, because in origin.items()
        if key.partition(".")[2] in SEARCHED and because.startswith(("flag ", "file "))
    }


def search(
    variant: LayoutVariant,
    asked: PlanInputs,
    cluster: Cluster,
    *,
    model: ModelConfig,
    fixed: Mapping[str, str] = MappingProxyType({}),
) -> SearchResult:
    """Try every tp, sp, pp, chunks, schedule, micro batch, recompute and optimizer sharding.

    fixed: those of SEARCHED that stay as asked, with their flags; a part of a schedule, or of
    recomputation, fixes all of it.
    """
    fitting: list[Forecast] = []
    too_large = forbidden = 0
    least, closest = math.inf, None
    drawn: dict[tuple[object, ...], Blueprint] = {}
    for layout, micro_batch_size in _layouts(asked, cluster, model, frozenset(fixed)):
        # what is split along the sequence or sharded over dp changes no stage and no schedule
        key = (layout.tp, layout.pp, layout.pipeline_schedule,
               layout.num_virtual_stages_per_pipeline_rank, micro_batch_size)  # fmt: skip
        try:
            blueprint = drawn[key] if key in drawn else variant(layout, micro_batch_size)
        except ConfigError:
            forbidden += 1
            continue
        drawn[key] = blueprint
        # the ends need most, nearly always; where they fit, the forecast asks all
        ends = {0, blueprint.grid.pp - 1}
        choices = list(_memory_choices(layout, model.num_layers))
        if _RECOMPUTE & fixed.keys():
            choices = [layout]
        kept = dataclasses.replace(asked, parallel=layout, micro_batch_size=micro_batch_size)
        if max(static_total(blueprint, kept, rank) for rank in ends) >= least:
            too_large += len(choices)  # no choice changes this, and another layout misses by less
            continue
        for parallel in choices:
            tried = dataclasses.replace(kept, parallel=parallel)
            needed = max(rank.total for rank in memory(blueprint, tried, pp_ranks=ends))
            plan = None
            if needed <= cluster.device.memory_bytes:
                plan = forecast(blueprint, tried, cluster, simulated=False)
                needed = plan.worst.total
            if plan is not None and plan.fits:
                fitting.append(plan)
                break  # the choices come cheapest first: what fits needs no more recomputation
            too_large += 1
            if needed < least:
                least, closest = needed, (blueprint, tried)
    if not fitting and not too_large and not forbidden:
        raise ConfigError(
            f"--search: no layout on {cluster.world_size} devices, {cluster.devices_per_node} a node, is as "
            f"{' '.join(fixed.values())} say; leave some of them to the search"
        )
    fitting.sort(key=lambda tried: tried.rates.step_seconds)
    best = [forecast(f.blueprint, f.asked, cluster) for f in fitting[:_SIMULATED]]
    best.sort(key=lambda tried: tried.rates.step_seconds)
    return SearchResult(
        ranked=(*best, *fitting[_SIMULATED:]),
        num_simulated=len(best),
        num_too_large=too_large,
        num_forbidden=forbidden,
        closest=forecast(*closest, cluster, simulated=False) if closest and not fitting else None,
    )


def _layouts(
    asked: PlanInputs, cluster: Cluster, model: ModelConfig, fixed: frozenset[str]
) -> Iterator[tuple[ParallelConfig, int]]:
    """Those of all layouts that are as asked in what is fixed."""
    start, kept = asked.parallel, fixed - _STAGES - _RECOMPUTE - {"micro_batch_size"}
    for layout, micro_batch_size in _all_layouts(
        asked, cluster, model, staged=bool(fixed & _STAGES)
    ):
        # at tp 1 nothing is split, and at dp 1 nothing sharded, whatever is asked
        free = {"sequence_parallel"} if layout.tp == 1 else set()
        if cluster.world_size == layout.ranks_per_sample:
            free |= {"zero_stage", "overlap_param_gather"}
        if all(getattr(layout, name) == getattr(start, name) for name in kept - free) and (
            "micro_batch_size" not in fixed or micro_batch_size == asked.micro_batch_size
        ):
            yield layout, micro_batch_size


def _all_layouts(
    asked: PlanInputs, cluster: Cluster, model: ModelConfig, *, staged: bool
) -> Iterator[tuple[ParallelConfig, int]]:
    """staged: with the schedule that is asked for, and its stages."""
    world, start = cluster.world_size, asked.parallel
    own_schedule = [(start.pipeline_schedule, start.num_virtual_stages_per_pipeline_rank)]
    even: dict[str, Any] = {} if staged else dict.fromkeys(_STAGES)
    for tp in _divisors(world):
        if tp > min(cluster.devices_per_node, model.num_attention_heads):
            continue
        for pp in _divisors(world // (tp * start.cp)):
            if pp > model.num_layers:
                continue
            dp = world // (tp * pp * start.cp)
            for (schedule, chunks), split, sharded, micro_batch_size in product(
                own_schedule if staged else _schedules(pp, model.num_layers),
                (True, False) if tp > 1 else (False,),
                (True, False) if dp > 1 else (False,),
                sorted({*MICRO_BATCHES, asked.micro_batch_size}),
            ):
                if sharded or dp == 1 or split == (tp > 1):  # both off at once gains nothing
                    yield (
                        dataclasses.replace(
                            start,
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            sequence_parallel=split,
                            **even
                            | {
                                "pipeline_schedule": schedule,
                                "num_virtual_stages_per_pipeline_rank": chunks,
                            },
                            zero_stage=max(start.zero_stage, 1) if sharded else 0,
                            overlap_param_gather=sharded,
                        ),
                        micro_batch_size,
                    )


def _schedules(pp: int, num_layers: int) -> Iterator[tuple[Name, int | None]]:
    """Schedules worth trying; gpipe keeps more and is never faster than 1f1b."""
    yield "1f1b", None
    if pp == 1:
        return
    for chunks in _divisors(num_layers // pp):
        if 2 <= chunks <= 6:
            yield "interleaved", chunks
    yield "zb-h1", None
    yield "zb-v", None


def _memory_choices(layout: ParallelConfig, num_layers: int) -> Iterator[ParallelConfig]:
    """The same layout with less and less kept for backward, the cheapest in time first."""

    def choice(
        granularity: Granularity | None, method: Method | None = None, layers: int | None = None,
        modules: tuple[str, ...] = ("core_attn",),
    ) -> ParallelConfig:  # fmt: skip
        return dataclasses.replace(
            layout, recompute_granularity=granularity, recompute_method=method,
            recompute_num_layers=layers, recompute_modules=list(modules),
        )  # fmt: skip

    stage = num_layers // (layout.pp * (layout.num_virtual_stages_per_pipeline_rank or 1))
    yield choice(None)
    yield choice("selective")
    for layers in sorted({stage // 4, stage // 2} - {0}):
        yield choice("full", "block", layers)
    yield choice("selective", modules=("core_attn", "mlp"))
    yield choice("full", "uniform", 1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
