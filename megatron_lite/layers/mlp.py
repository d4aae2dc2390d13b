"""The feed-forward layers, GELU or SwiGLU, with the features split over tp."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Activation, Matrix
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)) (arXiv:2002.05202), of block `layer`.

    One all-reduce, after down (arXiv:1909.08053 § 3); gate and up are one matrix in memory.
    """

    def __init__(self, context: StageContext, layer: int) -> None:
        super().__init__()
        parts = context.figure.layers[layer]
        self.up = ColumnParallelLinear(context, parts.named("mlp.up", Matrix), layer)
        self.down = RowParallelLinear(context, parts.named("mlp.down", Matrix), layer)
        self.activation = context.choose(parts.named("mlp.activation", Activation).function)

    def forward(self, x: Tensor, at: ForwardContext | None = None) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same, without down.late_bias.

        at: for the dropout of adapters.
        """
        y = self.up(x, at)  # [s, b, f/tp], or [s, b, 2f/tp] of gate and up
        return self.down(self.activation(y), at)
