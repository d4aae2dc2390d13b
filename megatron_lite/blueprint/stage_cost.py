"""How long actions take, in FLOPs per token: for the plan's bubble where stages are not alike."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.blueprint.figure.parts import Figure, Parts
from megatron_lite.blueprint.flops import (
    core_forward,
    head_forward,
    head_weights,
    layer_forward,
    layer_weights,
)
from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.blueprint.schedules.simulate import Cost
from megatron_lite.blueprint.stages import StageLayers


def flops_cost(figure: Figure, stages: Sequence[StageLayers], seq_length: int) -> Cost:
    """Matrix products of each action, causal attention; the lookup of an embedding costs none.

    The gradient of the input repeats forward's products and adds attention's core a second time
    (both its factors are activations); that of the weights has the projections alone
    (arXiv:2401.10241, table 1).
    """

    def whole(layer: Parts) -> int:
        return layer_forward(layer, seq_length, "causal")

    def core(layer: Parts) -> int:
        return core_forward(layer, seq_length, "causal")

    def of_stage(stage: StageLayers) -> dict[Op, float]:
        layers, cores, weights = (
            figure.total(value, stage.layers) for value in (whole, core, layer_weights)
        )
        head, of_head = (value(figure) * stage.has_head for value in (head_forward, head_weights))
        return {
            Op.F: layers + head,
            Op.I: layers + cores + head,
            Op.W: weights + of_head,
            Op.B: layers + cores + weights + head + of_head,
        }

    costs = [of_stage(stage) for stage in stages]

    def cost(action: Action) -> float:
        return float(max(costs[action.stage][action.op], 1))

    return cost
