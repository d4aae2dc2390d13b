"""GPT-2's config.json of Hugging Face <-> ModelConfig; what one cannot say in the other is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import ModelConfig

GELU: Mapping[str, Literal["tanh", "erf"]] = MappingProxyType(
    {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
)
"""activation_function -> our --gelu; the first name of a form is written (two are kernels of one)."""

_NEEDED = {"model_type": "gpt2", "scale_attn_weights": True, "add_cross_attention": False,
           "scale_attn_by_inverse_layer_idx": False}  # fmt: skip
"""What must be so; the last three are so where they are not said."""


def model_of(config: Mapping[str, Any], path: Path) -> tuple[ModelConfig, list[str]]:
    """Our GPT-2 of a config.json, and what to say about it.

    seq_length is all positions.  Raises CheckpointError with every setting that we do not have.
    """
    problems = [
        f"{key} {config.get(key)!r}: only {needed!r} is our GPT-2"
        for key, needed in _NEEDED.items()
        if config.get(key, None if key == "model_type" else needed) != needed
    ]
    activation = config.get("activation_function", "gelu_new")
    if activation not in GELU:
        problems.append(f"activation_function {activation!r}: ours are {', '.join(GELU)}")
    if config.get("quantization_config") is not None:
        problems.append("quantization_config: its weights are packed in a way that is not read")
    sizes: dict[str, Any] = {
        key: config.get(key) for key in ("n_layer", "n_embd", "n_head", "n_positions")
    }
    sizes["vocab_size"] = config.get("vocab_size", 50257)
    if config.get("n_inner") is not None:
        sizes["n_inner"] = config["n_inner"]
    problems += [
        f"{key} {value!r}: not a whole number above 0 that a tensor can have"
        for key, value in sizes.items()
        if type(value) is not int or not 0 < value < 1 << 31
    ]
    rates = {key: config.get(key, default) for key, default in (
        ("resid_pdrop", 0.1), ("embd_pdrop", 0.1), ("attn_pdrop", 0.1),
        ("layer_norm_epsilon", 1e-5), ("initializer_range", 0.02))}  # fmt: skip
    problems += [
        f"{key} {value!r}: not a number from 0 to 1"
        for key, value in rates.items()
        if type(value) not in (int, float) or not 0 <= value < 1
    ]
    problems += [
        f"{key} {rates[key]!r}: must be above 0"
        for key in ("layer_norm_epsilon", "initializer_range")
        if rates[key] == 0
    ]
    if not problems and sizes["n_embd"] % sizes["n_head"]:
        problems.append(f"n_embd {sizes['n_embd']} cannot be split over n_head {sizes['n_head']}")
    if problems:
        raise CheckpointError(f"{path} is not a GPT-2 that can be converted: {'; '.join(problems)}")
    notices = []
    if rates["resid_pdrop"] != rates["embd_pdrop"]:
        notices.append(
            f"embd_pdrop {rates['embd_pdrop']} becomes resid_pdrop {rates['resid_pdrop']}: "
            "--hidden-dropout is both"
        )
    model = ModelConfig(
        num_layers=sizes["n_layer"],
        hidden_size=sizes["n_embd"],
        num_attention_heads=sizes["n_head"],
        seq_length=sizes["n_positions"],
        max_position_embeddings=sizes["n_positions"],
        ffn_hidden_size=sizes.get("n_inner", 4 * sizes["n_embd"]),
        vocab_size=sizes["vocab_size"],
        gelu=GELU[activation],
        norm_epsilon=float(rates["layer_norm_epsilon"]),
        hidden_dropout=float(rates["resid_pdrop"]),
        attention_dropout=float(rates["attn_pdrop"]),
        init_method_std=float(rates["initializer_range"]),
        untie_embeddings_and_output_weights=config.get("tie_word_embeddings") is False,
    )
    return model, notices


def _inexpressible(model: ModelConfig) -> Iterator[str]:
    """The flags of what Hugging Face's GPT-2 does not have."""
    if model.position_embedding_type != "learned_absolute":
        yield f"--position-embedding-type {model.position_embedding_type}"
    if model.normalization != "LayerNorm":
        yield f"--normalization {model.normalization}"
    if not model.layernorm_bias:
        yield "--no-layernorm-bias"
    if model.apply_layernorm_1p:
        yield "--apply-layernorm-1p"
    if model.swiglu:
        yield "--swiglu"
    if not model.add_bias_linear:
        yield "--disable-bias-linear"
    if model.num_kv_heads != model.num_attention_heads:
        yield f"--num-query-groups {model.num_kv_heads}"
    if model.head_size * model.num_attention_heads != model.hidden_size:
        yield f"--kv-channels {model.head_size}"


def config_of(
    model: ModelConfig, dtype: torch.dtype, *, eod: int | None, where: str
) -> dict[str, Any]:
    """config.json of our GPT-2; eod: the end-of-document id, None if not known.

    Raises CheckpointError naming every flag it has no words for.
    """
    flags = list(_inexpressible(model))
    if flags:
        raise CheckpointError(
            f"{where}: Hugging Face's GPT-2 has no {', '.join(flags)} - this model cannot be "
            "written as one"
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.num_positions,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "activation_function": next(name for name, form in GELU.items() if form == model.gelu),
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
