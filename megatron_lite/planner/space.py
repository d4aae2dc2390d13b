"""What a search chooses: layouts, schedules, sharding of the optimizer, and what is recomputed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, product
from typing import Any, Literal, NamedTuple

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.rules.layout import divisors
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.parallel import RECOMPUTE_MODULES, ParallelConfig
from megatron_lite.planner.hardware import Cluster
from megatron_lite.planner.memory import PlanInputs

LayoutVariant = Callable[[ParallelConfig, int], Blueprint]
"""(layout, micro batch size) -> Blueprint of the same run; ConfigError where a rule forbids it."""

_Name = Literal["1f1b", "interleaved", "zb-h1", "zb-v"]
_Granularity = Literal["full", "selective"]
_Method = Literal["uniform", "block"]
_ZeroStage = Literal[0, 1, 2, 3]

MICRO_BATCHES = (1, 2, 4, 8, 16)
MOST_CHUNKS = 12

DEALING = frozenset((
    "pipeline_schedule", "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
))  # fmt: skip
RECOMPUTE = frozenset((
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "distribute_saved_activations",
))  # fmt: skip
SHARDING = frozenset(("zero_stage", "overlap_param_gather"))
SIZES = frozenset((
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "micro_batch_size",
))  # fmt: skip
SEARCHED = DEALING | RECOMPUTE | SHARDING | SIZES
"""What a search chooses where it is not fixed."""


def said(origin: Mapping[str, str]) -> dict[str, str]:
    """Of what a search chooses, what flags or files have said: the field's name -> its flag."""
    return {
        key.partition(".")[2]: settings()[key].flag
        for key, because in origin.items()
        if key.partition(".")[2] in SEARCHED and because.startswith(("flag ", "file "))
    }


def layouts(
    asked: PlanInputs, cluster: Cluster, model: ModelConfig, fixed: frozenset[str]
) -> Iterator[tuple[ParallelConfig, int]]:
    """Those of all layouts, with their micro batch sizes, that are as asked in what is fixed.

    A part of a schedule fixes all of it.  Sharding and recomputation are as asked.
    """
    start, kept = asked.parallel, fixed & (SIZES - {"micro_batch_size"})
    sizes = sorted({*MICRO_BATCHES, asked.micro_batch_size})
    if "micro_batch_size" in fixed:
        sizes = [asked.micro_batch_size]
    for layout in _split(asked, cluster, model, staged=bool(fixed & DEALING)):
        # at tp 1 nothing is split, whatever is asked
        free = {"sequence_parallel"} if layout.tp == 1 else set()
        if all(getattr(layout, name) == getattr(start, name) for name in kept - free):
            for size in sizes:
                yield layout, size


def _split(
    asked: PlanInputs, cluster: Cluster, model: ModelConfig, *, staged: bool
) -> Iterator[ParallelConfig]:
    """staged: with the schedule that is asked for, and its stages."""
    world, start = cluster.world_size, asked.parallel
    even: dict[str, Any] = {} if staged else dict.fromkeys(DEALING)
    own = [(start.pipeline_schedule, start.num_virtual_stages_per_pipeline_rank)]
    for tp in divisors(world):
        if tp > min(cluster.devices_per_node, model.num_attention_heads) and tp != start.tp:
            continue
        for pp in divisors(world // (tp * start.cp)):
            if pp > model.num_layers + 2:  # an embedding or a loss may count as a layer
                continue
            for (schedule, chunks), split in product(
                own if staged else _schedules(pp, start, model.num_layers),
                (True, False) if tp > 1 else (False,),
            ):
                yield dataclasses.replace(
                    start,
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    sequence_parallel=split,
                    **even
                    | {
                        "pipeline_schedule": schedule,
                        "num_virtual_stages_per_pipeline_rank": chunks,
                    },
                )


def _schedules(
    pp: int, start: ParallelConfig, num_layers: int
) -> Iterator[tuple[_Name, int | None]]:
    """Schedules worth trying; gpipe keeps more and is never faster than 1f1b."""
    yield "1f1b", None
    if pp == 1:
        return
    dealt = num_layers + sum((
        start.account_for_embedding_in_pipeline_split, start.account_for_loss_in_pipeline_split,
    ))  # fmt: skip
    for chunks in divisors(dealt // pp):
        if 2 <= chunks <= MOST_CHUNKS:
            yield "interleaved", chunks
    yield "zb-h1", None
    yield "zb-v", None


def shardings(
    layout: ParallelConfig, dp: int, asked: ParallelConfig, fixed: frozenset[str]
) -> Iterator[ParallelConfig]:
    """The same layout with nothing shared by dp ranks, and with each stage of ZeRO.

    Stages 2 and 3 of a pipeline have gradients and weights whole during a step: no more fits there.
    """
    stages: tuple[_ZeroStage, ...] = (0,)
    if dp > 1:
        stages = (0, 1, 2, 3) if layout.pp == 1 else (0, 1)
        if "zero_stage" in fixed:
            stages = (asked.zero_stage,)
    for stage in stages:
        ahead = stage in (1, 2) and asked.overlap_grad_reduce
        if "overlap_param_gather" in fixed and ahead:
            ahead = asked.overlap_param_gather
        yield dataclasses.replace(layout, zero_stage=stage, overlap_param_gather=ahead)


class Choices(NamedTuple):
    """Layouts that differ in what is recomputed; none costs less time than those before it.

    falling: none keeps more, either.
    """

    layouts: list[ParallelConfig]
    falling: bool = False


def recomputations(layout: ParallelConfig, layers: int, fixed: frozenset[str]) -> Iterator[Choices]:
    """The same layout with less and less kept for backward; layers: most that a stage has.

    The first choices cost no more time than any other.
    """
    if fixed & RECOMPUTE:
        yield Choices([layout])
        return

    def choice(
        granularity: _Granularity | None = None, method: _Method | None = None,
        count: int | None = None, modules: tuple[str, ...] = ("core_attn",),
    ) -> ParallelConfig:  # fmt: skip
        return dataclasses.replace(
            layout, recompute_granularity=granularity, recompute_method=method,
            recompute_num_layers=count, recompute_modules=list(modules), distribute_saved_activations=False,
        )  # fmt: skip

    yield Choices([choice()])
    for number in range(1, len(RECOMPUTE_MODULES) + 1):
        for modules in combinations(RECOMPUTE_MODULES, number):
            yield Choices([choice("selective", modules=modules)])
    yield Choices([choice("full", "block", count) for count in range(1, layers)], falling=True)
    yield Choices([choice("full", "uniform", count) for count in divisors(layers)])
