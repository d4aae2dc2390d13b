"""Tiny models of transformers' Llama, with random weights."""

from __future__ import annotations

from typing import Any

import torch


def llama(**changes: object) -> Any:
    """transformers' model: 6 heads, 2 keys, odd feed-forward and vocabulary, random weights."""
    import transformers  # an optional extra

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "vocab_size": 263, "max_position_embeddings": 24, "hidden_size": 48, "intermediate_size": 53,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "bos_token_id": 261, "eos_token_id": 261, "rope_parameters":
        {"rope_type": "default", "rope_theta": 5000.0}, **changes,
    })  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model
