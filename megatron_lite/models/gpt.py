"""The GPT block: pre-norm attention and MLP, each added to the stream (GPT-2, GPT-3: arXiv:2005.14165)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from megatron_lite.blueprint.figure import parts as figure
from megatron_lite.layers.attention import SelfAttention
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import HiddenDropout
from megatron_lite.layers.mlp import MLP
from megatron_lite.layers.norm import NormLayer
from megatron_lite.layers.recompute import recomputed_part


class GPTBlock(nn.Module):
    """x + drop(attention(norm(x))), then x + drop(mlp(norm(x))); or both added to the same x (GPT-NeoX).

    What stands between two products is one kernel: that of adding a part to the stream includes the
    bias of a sum over tp, dropout and the norm before the next product.
    """

    def __init__(self, context: StageContext, layer: int) -> None:
        super().__init__()
        self.context, self.layer = context, layer
        parts = context.figure.layers[layer]
        self.attention_norm = NormLayer(context, parts.named("attention_norm", figure.Norm))
        self.attention = SelfAttention(context, layer)
        self.mlp_norm = NormLayer(context, parts.named("mlp_norm", figure.Norm))
        self.mlp = MLP(context, layer)
        self.attention_dropout = HiddenDropout(context, layer, "attention.output")
        self.mlp_dropout = HiddenDropout(context, layer, "mlp.output")
        self.add = context.choose("add_dropout")

    def forward(self, x: Tensor, at: ForwardContext) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same."""
        again = partial(recomputed_part, self.context.recompute)
        y = self.attention(again("layernorm", self.attention_norm, x), at)
        bias, dropped = self.attention.output.late_bias, self.attention_dropout.call(at)
        if self.mlp_norm.part.beside:
            stream = self.add(x, y, bias, dropped)
            x, y = stream, again("layernorm", self.mlp_norm, x)
        elif "layernorm" in self.context.recompute.modules:  # the sum is kept, its norm is not
            x = self.add(x, y, bias, dropped)
            y = again("layernorm", self.mlp_norm, x)
        else:
            x, y = self.mlp_norm(x, y, bias, dropped)
        y = again("mlp", self.mlp, y, at)
        return self.add(x, y, self.mlp.down.late_bias, self.mlp_dropout.call(at))
