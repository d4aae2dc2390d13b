"""Every field decides whether trained weights depend on it; what differs is told with both values."""

import dataclasses
from collections import Counter

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.rules.model_identity import (
    CHANGEABLE,
    COMPARED,
    ELSEWHERE,
    FREE,
    REQUIRED,
    defaults_before,
    model_differences,
    named,
)
from megatron_lite.config.rules.table import check_config
from megatron_lite.config.sections.model import ModelConfig

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16)
ROPE = dataclasses.replace(MODEL, position_embedding_type="rope")


def test_every_field_is_decided_once() -> None:
    decided = Counter(f"model.{trait.name}" for trait in COMPARED)
    decided.update(ELSEWHERE.keys())
    decided.update(f"{section}.{name}" for section, names in FREE.items() for name in names.split())
    new, gone = settings().keys() - decided.keys(), decided.keys() - settings().keys()
    assert not new, (
        f"does a weight mean something else with {sorted(new)}? config/rules/model_identity.py"
    )
    assert not gone, f"{sorted(gone)} are no fields any more"
    assert [key for key, count in decided.items() if count > 1] == []


def test_what_older_checkpoints_meant_is_what_this_version_asks_for_by_default() -> None:
    """Recorded values: a default that changes must not change what an old checkpoint means."""
    assert defaults_before() == {
        "kv_channels": None, "num_query_groups": None, "group_query_attention": False,
        "ffn_hidden_size": None, "max_position_embeddings": None,
        "position_embedding_type": "learned_absolute", "rotary_base": 10000.0, "rotary_percent": 1.0,
        "rotary_interleaved": False, "rope_scaling_type": "none", "rope_scaling_factor": 8.0,
        "rope_original_length": 8192,
        "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
        "rope_beta_fast": 32.0, "rope_beta_slow": 1.0, "rope_whole_channels": True,
        "rope_attention_factor": None, "rope_short_factors": None, "rope_long_factors": None,
        "rope_clex_width": 1,
        "window_size": None, "qk_layernorm": False, "parallel_residual": False,
        "normalization": "LayerNorm", "norm_epsilon": 1e-5, "layernorm_bias": True, "apply_layernorm_1p": False,
        "swiglu": False, "gelu": "tanh", "add_bias_linear": True, "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": False,
    }  # fmt: skip
    required = {trait.name for trait in COMPARED if trait.before is REQUIRED}
    assert required == {"num_layers", "hidden_size", "num_attention_heads", "seq_length"}


@pytest.mark.parametrize(
    ("before", "changed", "told"),
    [
        (MODEL, {"num_attention_heads": 8}, ["--num-attention-heads: 4 -> 8"]),
        (MODEL, {"kv_channels": 16}, ["--kv-channels: 8 -> 16"]),
        (MODEL, {"kv_channels": 8}, []),
        (MODEL, {"ffn_hidden_size": 128}, []),
        (MODEL, {"group_query_attention": True, "num_query_groups": 4}, []),
        (MODEL, {"group_query_attention": True, "num_query_groups": 2}, ["--num-query-groups: 4 -> 2"]),
        (MODEL, {"rotary_base": 5e5}, []),
        (ROPE, {"rotary_base": 5e5}, ["--rotary-base: 10000 -> 500000"]),
        (ROPE, {"rotary_percent": 0.5}, ["--rotary-percent: 1 -> 0.5"]),
        (ROPE, {"rope_scaling_factor": 2.0}, []),
        (ROPE, {"rope_scaling_type": "linear"}, ["--rope-scaling-type: none -> linear"]),
        (dataclasses.replace(ROPE, rope_scaling_type="linear"),
         {"rope_scaling_factor": 2.0, "rope_original_length": 64}, ["--rope-scaling-factor: 8 -> 2"]),
        (dataclasses.replace(ROPE, rope_scaling_type="llama3"),
         {"rope_original_length": 64}, ["--rope-original-length: 8192 -> 64"]),
        (dataclasses.replace(ROPE, rope_scaling_type="yarn"), {"rope_attention_factor": 1.0},
         ["--rope-attention-factor: 1.20794415417 -> 1"]),
        (dataclasses.replace(ROPE, rope_scaling_type="yarn"), {"rope_beta_fast": 8.0},
         ["--rope-beta-fast: 32 -> 8"]),
        (ROPE, {"max_position_embeddings": 99}, []),
        (MODEL, {"max_position_embeddings": 99}, ["--max-position-embeddings: 16 -> 99"]),
        (MODEL, {"position_embedding_type": "rope"},
         ["--position-embedding-type: learned_absolute -> rope"]),
        (ROPE, {"seq_length": 8}, ["--seq-length: 16 -> 8"]),
        (MODEL, {"normalization": "RMSNorm", "norm_epsilon": 1e-6},
         ["--normalization: LayerNorm -> RMSNorm", "--norm-epsilon: 1e-05 -> 1e-06"]),
        (MODEL, {"gelu": "erf"}, ["--gelu: tanh -> erf"]),
        (dataclasses.replace(MODEL, swiglu=True), {"gelu": "erf"}, []),
        (MODEL, {"hidden_dropout": 0.0, "init_method_std": 1.0}, []),
    ],
)  # fmt: skip
def test_what_counts_is_the_value_that_is_used(before, changed, told) -> None:
    assert [
        str(d) for d in model_differences(before, dataclasses.replace(before, **changed))
    ] == told


def test_names_are_fields_or_flags_with_commas_between() -> None:
    assert named("rotary_base, --seq-length,") == ["rotary_base", "seq_length"]
    assert named(None) == []


def test_what_cannot_change_is_refused_before_anything_starts() -> None:
    words = ["--preset", "gpt2-124m", "--mock-data", "--train-iters", "1", "--lr", "1e-3"]
    asked = parse([*words, "--load", "x", "--allow-model-change", "rotary_base,hidden_size,typo"])
    with pytest.raises(ConfigError) as refused:
        check_config(asked.config, 1)
    text = str(refused.value)
    assert "--allow-model-change hidden_size: " in text and "--allow-model-change typo: " in text
    assert all(name in text for name in CHANGEABLE) and "change rotary_base:" not in text
    with pytest.raises(ConfigError, match="--allow-model-change needs --load"):
        check_config(parse([*words, "--allow-model-change", "seq_length"]).config, 1)
