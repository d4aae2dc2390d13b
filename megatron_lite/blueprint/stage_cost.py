"""How long actions take, in FLOPs per token: for the plan's bubble where stages are not alike."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.blueprint.flops import core_forward, layer_forward
from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.blueprint.schedules.simulate import Cost
from megatron_lite.blueprint.stages import Stage
from megatron_lite.config.model import ModelConfig


def flops_cost(model: ModelConfig, stages: Sequence[Stage], padded_vocab_size: int) -> Cost:
    """Matrix products of each action, causal attention; the lookup of an embedding costs none.

    The gradient of the input repeats forward's products and adds attention's core a second time
    (both its factors are activations); that of the weights has the projections alone
    (arXiv:2401.10241, table 1).
    """
    layer, core = layer_forward(model, "causal"), core_forward(model, "causal")
    head = 2 * model.hidden_size * padded_vocab_size
    per_layer = {Op.F: layer, Op.I: layer + core, Op.W: layer - core, Op.B: 2 * layer}
    per_head = {Op.F: head, Op.I: head, Op.W: head, Op.B: 2 * head}

    def cost(action: Action) -> float:
        stage = stages[action.stage]
        products = len(stage.layers) * per_layer[action.op]
        return float(max(products + stage.has_head * per_head[action.op], 1))

    return cost
