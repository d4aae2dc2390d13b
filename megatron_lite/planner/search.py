"""All layouts of a run that fit its machines, ranked by predicted step time.

Closed forms look at every layout; the best few are then simulated event by event, and their
order is the simulation's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.planner.advice import Variant
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.hardware import Cluster
from megatron_lite.planner.memory import Asked

Name = Literal["1f1b", "interleaved", "zb-h1", "zb-v"]
Granularity = Literal["full", "selective"]

MICRO_BATCHES = (1, 2, 4, 8, 16)
_SIMULATED = 24


@dataclass(frozen=True, slots=True)
class Found:
    """What a search looked at; `ranked` fits, the first `num_simulated` by simulation."""

    ranked: tuple[Forecast, ...]
    num_simulated: int
    num_too_large: int
    num_forbidden: int
    closest: Forecast | None
    """Where nothing fits: the layout that misses by least."""


def search(variant: Variant, asked: Asked, cluster: Cluster, *, model: ModelConfig) -> Found:
    """Try every tp, pp, chunks, schedule, micro batch, recompute and optimizer sharding."""
    fitting: list[Forecast] = []
    too_large = forbidden = 0
    closest: Forecast | None = None
    for layout, micro_batch in _layouts(asked.parallel, cluster, model):
        try:
            blueprint = variant(layout, micro_batch)
        except ConfigError:
            forbidden += 1
            continue
        for parallel in _memory_choices(layout):
            tried = forecast(
                blueprint,
                dataclasses.replace(asked, parallel=parallel, micro_batch_size=micro_batch),
                cluster,
                simulated=False,
            )
            if tried.fits:
                fitting.append(tried)
                break  # the choices come cheapest first: what fits needs no more recomputation
            too_large += 1
            if closest is None or tried.worst.total < closest.worst.total:
                closest = tried
    fitting.sort(key=lambda tried: tried.rates.step_seconds)
    best = [forecast(f.blueprint, f.asked, cluster) for f in fitting[:_SIMULATED]]
    best.sort(key=lambda tried: tried.rates.step_seconds)
    return Found(
        ranked=(*best, *fitting[_SIMULATED:]),
        num_simulated=len(best),
        num_too_large=too_large,
        num_forbidden=forbidden,
        closest=closest if not fitting else None,
    )


def _layouts(
    start: ParallelConfig, cluster: Cluster, model: ModelConfig
) -> Iterator[tuple[ParallelConfig, int]]:
    world = cluster.world_size
    for tp in _divisors(world):
        if tp > min(cluster.devices_per_node, model.num_attention_heads):
            continue
        for pp in _divisors(world // (tp * start.cp)):
            if pp > model.num_layers:
                continue
            dp = world // (tp * pp * start.cp)
            for schedule, chunks in _schedules(pp, model.num_layers):
                for micro_batch in MICRO_BATCHES:
                    yield (
                        dataclasses.replace(
                            start,
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            sequence_parallel=tp > 1,
                            pipeline_schedule=schedule,
                            num_virtual_stages_per_pipeline_rank=chunks,
                            num_layers_per_virtual_pipeline_stage=None,
                            pipeline_model_parallel_layout=None,
                            decoder_first_pipeline_num_layers=None,
                            decoder_last_pipeline_num_layers=None,
                            use_distributed_optimizer=dp > 1,
                            overlap_param_gather=dp > 1,
                        ),
                        micro_batch,
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


def _memory_choices(layout: ParallelConfig) -> Iterator[ParallelConfig]:
    """The same layout with less and less kept for backward, the cheapest in time first."""
    choices: tuple[Granularity | None, ...] = (None, "selective", "full")
    for granularity in choices:
        full = granularity == "full"
        yield dataclasses.replace(
            layout,
            recompute_granularity=granularity,
            recompute_method="uniform" if full else None,
            recompute_num_layers=1 if full else None,
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
