"""The feed-forward layers, GELU or SwiGLU, with the features split over tp."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Activation, Matrix
from megatron_lite.kernels.table import choose
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)) (arXiv:2002.05202), of block `layer`.

    One all-reduce, after down (arXiv:1909.08053 § 3); gate and up are one matrix in memory.
    """

    def __init__(self, context: StageContext, layer: int) -> None:
        super().__init__()
        parts = context.figure.layers[layer]
        activation = parts.named("mlp.activation", Activation)
        self.gated = activation.gated
        self.up = ColumnParallelLinear(context, parts.named("mlp.up", Matrix))
        self.down = RowParallelLinear(context, parts.named("mlp.down", Matrix))
        self.activation = choose(activation.function, context.need()).run

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same."""
        y = self.up(x)  # [s, b, f/tp], or [s, b, 2f/tp] of gate and up
        inputs = y.chunk(2, dim=-1) if self.gated else (y,)
        return self.down(self.activation(*inputs))
