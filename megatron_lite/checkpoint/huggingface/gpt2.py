"""GPT-2 (model_type gpt2): learned positions, LayerNorm, GELU, q, k and v in one matrix kept [in, out]."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.names import FusedPart, Names
from megatron_lite.config.sections.model import ModelConfig

_NAMES = Names(
    prefix="transformer.",
    outside={
        "embedding.tokens": "wte",
        "embedding.positions": "wpe",
        "final_norm": "ln_f",
        "head": "lm_head",
    },
    layer="h.{}.",
    block={
        "attention_norm": "ln_1",
        "attention.q": FusedPart("attn.c_attn", 0),
        "attention.k": FusedPart("attn.c_attn", 1),
        "attention.v": FusedPart("attn.c_attn", 2),
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    transposed=True,
    constants=(".attn.bias", ".attn.masked_bias"),
)

GELU: MappingProxyType[str, Literal["tanh", "erf"]] = MappingProxyType(
    {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
)
"""activation_function -> our --gelu; the first name of a form is written (two are kernels of one)."""

_NEEDED = {
    "scale_attn_weights": True,
    "add_cross_attention": False,
    "scale_attn_by_inverse_layer_idx": False,
}
_HARMLESS = (
    "n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout",
)  # fmt: skip


def _config_in(config: ConfigFile) -> ModelConfig:
    config.must_be(_NEEDED, otherwise="is our GPT-2")
    gelu = config.choice("activation_function", GELU, "gelu_new")
    layers, h, heads, positions = map(config.size, ("n_layer", "n_embd", "n_head", "n_positions"))
    vocab_size = config.size("vocab_size", 50257)
    width = config.size("n_inner") if config.get("n_inner") is not None else 4 * h
    dropout = config.share("resid_pdrop", 0.1)
    embedding_dropout = config.share("embd_pdrop", 0.1)
    attention_dropout = config.share("attn_pdrop", 0.1)
    epsilon = config.share("layer_norm_epsilon", 1e-5, above_zero=True)
    std = config.share("initializer_range", 0.02, above_zero=True)
    tied = config.get("tie_word_embeddings") is not False
    config.require_sound()
    if h % heads:
        config.refuse(f"n_embd {h} cannot be split over n_head {heads}")
    if dropout != embedding_dropout:
        config.notices.append(
            f"embd_pdrop {embedding_dropout} becomes resid_pdrop {dropout}: --hidden-dropout is both"
        )
    # not refused: transformers computes a GPT-2 of its own keys alone
    config.notices.extend(
        f"{config.path.name}: {name} is not known here and left out"
        for name in config.unknown(_HARMLESS)
    )
    return ModelConfig(
        num_layers=layers,
        hidden_size=h,
        num_attention_heads=heads,
        seq_length=positions,
        max_position_embeddings=positions,
        ffn_hidden_size=width,
        vocab_size=vocab_size,
        gelu=gelu,
        norm_epsilon=epsilon,
        hidden_dropout=dropout,
        attention_dropout=attention_dropout,
        init_method_std=std,
        untie_embeddings_and_output_weights=not tied,
    )


def _config_out(model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
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
        "torch_dtype": dtype,
    }


GPT2 = Family(
    title="GPT-2",
    architecture="GPT2LMHeadModel",
    names=_NAMES,
    config_in=_config_in,
    config_out=_config_out,
    default_ends={50256: "GPT2Config"},
)
