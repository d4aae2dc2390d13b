"""The GPT block: pre-norm attention and MLP, each added to the stream (GPT-2, GPT-3: arXiv:2005.14165)."""

from __future__ import annotations

import re
from functools import partial
from typing import NamedTuple

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


class HuggingFaceSource(NamedTuple):
    """Where a canonical tensor lies in Hugging Face's GPT-2.

    transposed: HF keeps [in, out] (Conv1D); part: which third of HF's fused q|k|v, None for the whole.
    """

    name: str
    transposed: bool = False
    part: int | None = None


_TOP = {
    "embedding.tokens.weight": HuggingFaceSource("wte.weight"),
    "embedding.positions.weight": HuggingFaceSource("wpe.weight"),
    "final_norm.weight": HuggingFaceSource("ln_f.weight"),
    "final_norm.bias": HuggingFaceSource("ln_f.bias"),
    "head.weight": HuggingFaceSource("lm_head.weight"),
}
_BLOCK = {
    "attention_norm": ("ln_1", None),
    "attention.q": ("attn.c_attn", 0),
    "attention.k": ("attn.c_attn", 1),
    "attention.v": ("attn.c_attn", 2),
    "attention.output": ("attn.c_proj", None),
    "mlp_norm": ("ln_2", None),
    "mlp.up": ("mlp.c_fc", None),
    "mlp.down": ("mlp.c_proj", None),
}


def huggingface_source(canonical: str) -> HuggingFaceSource:
    """The place of a canonical GPT-2 tensor in a Hugging Face state dict.

    All but lm_head stand below `transformer.` there.
    """
    if canonical in _TOP:
        return _TOP[canonical]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", canonical)
    if match is None or match[2] not in _BLOCK:
        raise KeyError(f"{canonical} has no place in Hugging Face's GPT-2")
    layer, module, leaf = match.groups()
    theirs, part = _BLOCK[module]
    transposed = leaf == "weight" and "norm" not in module
    return HuggingFaceSource(f"h.{layer}.{theirs}.{leaf}", transposed, part)
