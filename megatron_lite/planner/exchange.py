"""Seconds of what the data-parallel ranks pass in a step: exposed, and hidden under computation."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.blueprint.schedules.actions import Op
from megatron_lite.config.pipeline import SPLIT_BACKWARD
from megatron_lite.planner.cost import Costs
from megatron_lite.planner.sharing import passed


@dataclass(frozen=True, slots=True)
class Exchange:
    """Seconds of a step."""

    exposed: float = 0.0
    gradients_hidden: float = 0.0
    parameters_hidden: float = 0.0


def data_parallel_seconds(costs: Costs, pp_rank: int) -> Exchange:
    """Of a pipeline rank.

    What is started bucket by bucket or layer by layer runs under one forward or backward, or its W: at
    ZeRO 2 and 3 of every micro batch, else under the first forward and the last backward.
    """
    blueprint, asked, cluster = costs.blueprint, costs.asked, costs.cluster
    grid, parallel, replicas = blueprint.grid, asked.parallel, blueprint.replicas
    if replicas == 1:
        return Exchange()
    stride = grid.rank(dp=1) if grid.dp > 1 else grid.rank(cp=1)
    sent = passed(
        blueprint, parallel, asked.precision, pp_rank, num_microbatches=blueprint.microbatches()
    )

    def ring(bytes_passed: float, passes: int = 1) -> float:
        if not bytes_passed:
            return 0.0
        return cluster.ring_seconds(bytes_passed / passes, replicas, stride=stride, passes=passes)

    stages, able = blueprint.stages_of(pp_rank), cluster.device.overlap
    # of interleaved chunks all but one have those of pp micro batches, which other chunks compute
    others = 1.0 - 1.0 / len(stages) if blueprint.schedule == "interleaved" else 0.0

    def hidden(seconds: float, one: float) -> float:
        wide = min(seconds, grid.pp * one)
        return (others * wide + (1.0 - others) * min(seconds, one)) * able

    last = Op.W if blueprint.schedule in SPLIT_BACKWARD else Op.B
    in_backward = sum(costs.work(last, stage).seconds for stage in stages)
    in_forward = sum(costs.work(Op.F, stage).seconds for stage in stages)
    scattered = ring(sent.gradients, 1 if parallel.shares_state else 2)
    first, again, updated = ring(sent.forward), ring(sent.backward), ring(sent.updated)
    later = ring(sent.forward - sent.kept)
    early = again + (scattered if parallel.overlap_grad_reduce else 0.0)
    under_backward = hidden(early, in_backward)
    # the first layer of a step's first micro batch is awaited
    under_first = hidden(max(first - ring(sent.awaited), 0.0), in_forward)
    under_later = hidden(later, in_forward)
    ahead = hidden(updated, in_forward) if parallel.overlap_param_gather else 0.0
    each = scattered + again - under_backward
    forwards = first - under_first + (sent.times - 1) * (later - under_later)
    again_hidden = under_backward * again / early if early else 0.0
    return Exchange(
        exposed=sent.times * each + forwards + updated - ahead,
        gradients_hidden=sent.times * (under_backward - again_hidden),
        parameters_hidden=sent.times * again_hidden
        + under_first
        + (sent.times - 1) * under_later
        + ahead,
    )
