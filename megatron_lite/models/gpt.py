"""The GPT block: pre-norm attention and MLP, each added to the stream (GPT-2, GPT-3: arXiv:2005.14165)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from megatron_lite.blueprint.figure import parts as figure
from megatron_lite.layers.attention import SelfAttention
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import hidden_dropout
from megatron_lite.layers.mlp import MLP
from megatron_lite.layers.norm import NormLayer
from megatron_lite.layers.recompute import recomputed_part


class GPTBlock(nn.Module):
    """x + drop(attention(norm(x))), then x + drop(mlp(norm(x)))."""

    def __init__(self, context: StageContext, layer: int) -> None:
        super().__init__()
        self.context, self.layer = context, layer
        parts = context.figure.layers[layer]
        self.attention_norm = NormLayer(context, parts.named("attention_norm", figure.Norm))
        self.attention = SelfAttention(context, layer)
        self.mlp_norm = NormLayer(context, parts.named("mlp_norm", figure.Norm))
        self.mlp = MLP(context, layer)

    def forward(self, x: Tensor, at: ForwardContext) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same."""
        again = partial(recomputed_part, self.context.recompute)
        y = self.attention(again("layernorm", self.attention_norm, x), at)
        x = x + self._drop(y, at, "attention.output")
        y = again("mlp", self.mlp, again("layernorm", self.mlp_norm, x))
        return x + self._drop(y, at, "mlp.output")

    def _drop(self, x: Tensor, at: ForwardContext, site: str) -> Tensor:
        return hidden_dropout(x, at, self.context, self.layer, site)
