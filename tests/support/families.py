"""A tiny model of transformers' of every family, with odd sizes and random weights in all of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

SIZES = {
    "vocab_size": 263, "max_position_embeddings": 24, "hidden_size": 48, "intermediate_size": 53,
    "num_hidden_layers": 2, "num_attention_heads": 6, "bos_token_id": 261, "eos_token_id": 261,
    "attn_implementation": "eager",
}  # fmt: skip
GATED = SIZES | {
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip

TINY: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType({
    "llama": ("Llama", GATED),
    "llama-tied": ("Llama", GATED | {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.5,
        "high_freq_factor": 3.0, "original_max_position_embeddings": 9}}),
    "llama-biases": ("Llama", GATED | {"attention_bias": True, "mlp_bias": True, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}}),
    "mistral": ("Mistral", GATED | {"sliding_window": 7, "head_dim": 10}),
    "mistral-whole": ("Mistral", GATED | {"sliding_window": None}),
    "gpt_neox": ("GPTNeoX", SIZES | {"rope_parameters": {
        "rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}),
    "gpt_neox-in-turn": ("GPTNeoX", SIZES | {
        "use_parallel_residual": False, "max_position_embeddings": 11, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0, "partial_rotary_factor": 1.0}}),
    "qwen3": ("Qwen3", GATED | {"head_dim": 10, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 5000.0, "factor": 2.5, "original_max_position_embeddings": 9,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4], "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0]}}),
    "qwen2": ("Qwen2", GATED | {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 5000.0, "factor": 2.5, "original_max_position_embeddings": 9,
        "beta_fast": 1.5, "beta_slow": 0.25}}),
})  # fmt: skip
"""Name -> transformers' model, and its config."""


def tiny(name: str, **changes: object) -> Any:
    """The model of a row, in evaluation."""
    import transformers  # an optional extra

    kind, config = TINY[name]
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**{**config, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    for parameter in model.parameters():  # biases and norms, too, have something to show
        torch.nn.init.normal_(parameter, std=0.2)
    return model
