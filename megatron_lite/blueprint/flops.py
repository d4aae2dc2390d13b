"""FLOPs of training, counted from the matrix products.

Where the 6 in 6N comes from: a parameter that multiplies costs 2 FLOPs (multiply, add) per token in
forward, and backward has two products of the same size (for the input, for the weight): 2 + 4 = 6.
Attention's scores and their product with V have no parameters and are counted apart.

Two conventions live in the field.  "full" counts the whole s x s square of attention (SC21
arXiv:2104.04473, Megatron-DeepSpeed's log line, most MFU figures); "causal" counts the half a
causal model needs (Megatron-LM since 2025).  Hardware peaks are not this file's business.
"""

from __future__ import annotations

from typing import Literal

from megatron_lite.config.model import ModelConfig

Attention = Literal["full", "causal"]
Recompute = Literal["full", "selective"]


def layer_forward(model: ModelConfig, attention: Attention = "full") -> int:
    """FLOPs of one block's forward per token."""
    h = model.hidden_size
    queries = model.num_attention_heads * model.head_size
    keys = model.num_kv_heads * model.head_size
    projections = 2 * h * (queries + 2 * keys) + 2 * queries * h
    mlp = 2 * (3 if model.swiglu else 2) * h * model.ffn_size
    return projections + core_forward(model, attention) + mlp


def core_forward(model: ModelConfig, attention: Attention = "full") -> int:
    """FLOPs per token of scores and weighted values alone: 4 * s * n * d, half if causal."""
    products = 4 if attention == "full" else 2
    return products * model.seq_length * model.num_attention_heads * model.head_size


def flops_per_token(
    model: ModelConfig,
    padded_vocab_size: int,
    *,
    attention: Attention = "full",
    recompute: Recompute | None = None,
) -> int:
    """FLOPs of forward and backward per token; with recompute, of what the hardware really does.

    full recompute runs every block's forward once more, selective only the core of attention.
    """
    layer = layer_forward(model, attention)
    head = 2 * model.hidden_size * padded_vocab_size
    once_more = {
        None: 0,
        "selective": core_forward(model, attention),
        "full": layer,
    }[recompute]
    return 3 * (model.num_layers * layer + head) + model.num_layers * once_more


def flops_per_step(
    model: ModelConfig,
    padded_vocab_size: int,
    global_batch_size: int,
    *,
    attention: Attention = "full",
    recompute: Recompute | None = None,
) -> int:
    """FLOPs of one optimizer step over all ranks."""
    per_token = flops_per_token(model, padded_vocab_size, attention=attention, recompute=recompute)
    return per_token * global_batch_size * model.seq_length
