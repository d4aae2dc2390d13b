"""Megatron's args, as its checkpoints keep them -> our model; what we do not have is refused by name.

Both spellings are known: Megatron-LM's and Megatron-DeepSpeed's, which left it in 2021 and calls some
of them otherwise (num_key_value_heads, use_rotary_position_embeddings, layernorm_epsilon).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megatron_lite.checkpoint.foreign.records import Record
from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import WINDOW, ModelConfig, yarn_scale

_NOTHING: dict[str, tuple[Any, ...]] = {
    "num_experts": (None, 1, [1]),
    "multi_latent_attention": (None, False),
    "qk_l2_norm": (None, False),
    "squared_relu": (None, False),
    "quick_geglu": (None, False),
    "onnx_safe": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "rope_type": (None, "rope"),
    "mrope_section": (None,),
    "no_rope_freq": (None,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (None, False),
    "attention_output_gate": (None, False),
    "softmax_type": (None, "vanilla"),
    "glu_linear_offset": (None, 0.0),
    "activation_func_clamp_value": (None,),
    "softmax_scale": (None,),
    "experimental_attention_variant": (None,),
    "add_bias_linear_fc": (None,),
}
"""What changes the numbers and is not taken from here -> its values that change none."""


def args_of(value: Any, path: Path) -> ConfigFile:
    """The args of a checkpoint by name; CheckpointError where there are none."""
    values = value.values if isinstance(value, Record) else value
    if not isinstance(values, dict) or "num_layers" not in values:
        raise CheckpointError(
            f"{path} has no args of Megatron's, which say the model's sizes: only what its own training "
            "wrote is read"
        )
    return ConfigFile(values, path, "Megatron", inside="args.")


def model_of(args: ConfigFile) -> ModelConfig:
    """The model that args say; raises CheckpointError naming every one that we do not have."""
    for key, harmless in _NOTHING.items():
        if args.get(key) not in harmless:
            args.refuse(f"args.{key} {str(args.get(key))[:40]}: no such model is built here")
    layers, h, heads, rows = map(
        args.size, ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size")
    )
    positions = args.size("max_position_embeddings")
    f = args.size("ffn_hidden_size", 4 * h)
    head_size = None if args.get("kv_channels") is None else args.size("kv_channels")
    bias = args.flag("add_bias_linear", default=True)
    kind = args.choice("normalization", {n: n for n in ("LayerNorm", "RMSNorm", "layernorm", "rmsnorm")},
                       "LayerNorm")  # fmt: skip
    groups, window = _groups(args, heads), _window(args)
    rotary, yarn = _rotary(args)
    qkv_bias = args.flag("add_qkv_bias", default=False)
    tied = not args.flag("untie_embeddings_and_output_weights", default=False)
    model = ModelConfig(
        num_layers=layers,
        hidden_size=h,
        num_attention_heads=heads,
        seq_length=positions,
        max_position_embeddings=positions,
        ffn_hidden_size=f,
        kv_channels=head_size,
        group_query_attention=groups != heads,
        num_query_groups=groups,
        vocab_size=rows,
        position_embedding_type=rotary,
        rotary_base=args.number("rotary_base", 10000.0),
        rotary_percent=args.number("rotary_percent", 1.0),
        rotary_interleaved=args.flag("rotary_interleaved", default=False) and rotary == "rope",
        **_scaling(args, rotary, yarn=yarn),
        window_size=window,
        normalization="RMSNorm" if kind.lower() == "rmsnorm" else "LayerNorm",
        norm_epsilon=args.share(_first(args, "norm_epsilon", "layernorm_epsilon"), 1e-5),
        qk_layernorm=args.flag("qk_layernorm", default=False),
        apply_layernorm_1p=args.flag("apply_layernorm_1p", default=False),
        swiglu=args.flag("swiglu", default=False),
        gelu=_gelu(args, bias=bias),
        add_bias_linear=bias,
        add_qkv_bias=qkv_bias and not bias,
        untie_embeddings_and_output_weights=not tied,
        hidden_dropout=args.share("hidden_dropout", 0.1),
        attention_dropout=args.share("attention_dropout", 0.1),
        init_method_std=args.number("init_method_std", 0.02),
    )
    args.require_sound()
    return model


def _first(args: ConfigFile, *names: str) -> str:
    """The first of these that is said."""
    return next((name for name in names if args.get(name) is not None), names[0])


def _groups(args: ConfigFile, heads: int) -> int:
    """Heads of keys and values: two flags of Megatron-LM's, one of Megatron-DeepSpeed's."""
    if args.get("num_key_value_heads") is not None:
        return args.size("num_key_value_heads")
    return args.size("num_query_groups") if args.get("group_query_attention") is True else heads


def _rotary(args: ConfigFile) -> tuple[Literal["learned_absolute", "rope", "none"], bool]:
    """How positions are known; whether they are scaled by YaRN, which is a kind of its own there."""
    old = args.get("use_rotary_position_embeddings") is True
    said = args.get("position_embedding_type", "rope" if old else "learned_absolute")
    said = said.args[0] if isinstance(said, Record) and said.args else said  # an enum's member
    if said == "yarn":
        return "rope", True
    if said in ("rope", "none", "learned_absolute") and not (old and said == "none"):
        return "rope" if old else said, False
    args.refuse(
        f"args.position_embedding_type {str(said)[:40]}: ours are learned_absolute, rope, none"
    )
    return "rope", False


def _window(args: ConfigFile) -> str | None:
    """LEFT,RIGHT of every layer's attention, a pair in the file."""
    said = args.get("window_size")
    if said is None:
        return None
    found = WINDOW.fullmatch(str(tuple(said) if isinstance(said, list) else said))
    if found is None:
        args.refuse(f"args.window_size {str(said)[:40]}: no LEFT,RIGHT with RIGHT 0 or -1")
        return None
    if args.get("window_attn_skip_freq") is not None:
        skipped = str(args.get("window_attn_skip_freq"))[:40]
        args.refuse(
            f"args.window_attn_skip_freq {skipped}: here all layers have the window, or none"
        )
    return f"{found[1]},{found[2]}"


def _scaling(args: ConfigFile, positions: str, *, yarn: bool) -> dict[str, Any]:
    """Fields of --rope-scaling-type: Megatron's three ways, which have no say without rotary positions."""
    slowed = args.get("use_rope_scaling") is True
    nearer = args.get("rotary_seq_len_interpolation_factor") not in (None, 1)
    if positions != "rope" or not (slowed or nearer or yarn):
        return {}
    if slowed + nearer + yarn > 1:
        args.refuse(
            "args.use_rope_scaling, args.rotary_seq_len_interpolation_factor and "
            "args.position_embedding_type yarn: only one of them is built here"
        )
    if yarn:
        return _yarn(args)
    key = "rope_scaling_factor" if slowed else "rotary_seq_len_interpolation_factor"
    factor = args.number(key, 8.0)
    return {"rope_scaling_type": "llama3" if slowed else "linear", "rope_scaling_factor": factor}


def _yarn(args: ConfigFile) -> dict[str, Any]:
    """What Megatron calls yarn_*, its attention factor made of two numbers as in DeepSeek's models."""
    factor, attention = args.number("yarn_rotary_scaling_factor", 1.0), None
    keys = ("yarn_mscale", "yarn_mscale_all_dim")
    if None not in (said := [args.get(key) for key in keys]):
        above, below = (
            0.0 if value == 0 else args.number(key, 1.0)
            for key, value in zip(keys, said, strict=True)
        )
        attention = yarn_scale(factor, above) / yarn_scale(factor, below)
    if args.number("rotary_percent", 1.0) != 1:
        args.refuse("args.rotary_percent: with YaRN all channels are turned")
    return {
        "rope_scaling_type": "yarn",
        "rope_scaling_factor": factor,
        "rope_original_length": args.size("yarn_original_max_position_embeddings", 4096),
        "rope_beta_fast": args.number("yarn_beta_fast", 32.0),
        "rope_beta_slow": args.number("yarn_beta_slow", 1.0),
        "rope_whole_channels": args.flag("yarn_correction_range_round_to_int", default=True),
        "rope_attention_factor": attention,
    }


def _gelu(args: ConfigFile, *, bias: bool) -> Literal["tanh", "erf"]:
    """Megatron's fusion of bias and GELU takes the tanh form, its plain GELU is the exact one."""
    fused = args.flag("bias_gelu_fusion", default=False) and bias
    unused = args.get("swiglu") is True
    return "tanh" if unused or fused or args.flag("openai_gelu", default=False) else "erf"
