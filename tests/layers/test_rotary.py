"""Rotary frequencies: what transformers computes, in fp64 here and fp32 there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint.foreign.gguf import plan_gguf
from megatron_lite.checkpoint.foreign.llama2c import plan_llama2c
from megatron_lite.checkpoint.foreign.megatron_args import args_of, model_of
from megatron_lite.checkpoint.huggingface.llama import LLAMA
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.layers.rotary import rotary_frequencies, rotary_tables
from tests.support.extras import needs

LLAMA31 = {
    "rope_original_length": ("original_max_position_embeddings", 8192),
    "rope_low_freq_factor": ("low_freq_factor", 1.0),
    "rope_high_freq_factor": ("high_freq_factor", 4.0),
}


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("linear", {}),
        ("llama3", LLAMA31),
        ("llama3", LLAMA31 | {"rope_original_length": ("original_max_position_embeddings", 100)}),
    ],
)
def test_frequencies_are_those_of_transformers(
    kind: str, parameters: dict[str, Any], share: float, factor: float
) -> None:
    theirs = dict(parameters.values())
    config = needs("transformers").LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=1 << 17,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, "factor": factor,
                         "partial_rotary_factor": share, **theirs},
    )  # fmt: skip
    oracle = needs("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    expected, scale = oracle[kind](config)
    model = ModelConfig(
        rotary_base=5e5, rope_scaling_type=kind, rope_scaling_factor=factor,  # type: ignore[arg-type]
        **{name: value for name, (_, value) in parameters.items()},
    )  # fmt: skip
    found = rotary_frequencies(int(128 * share), model)
    assert scale == 1.0
    torch.testing.assert_close(found.float(), expected, rtol=2e-6, atol=0.0)


def test_llama3_keeps_fast_channels_and_slows_slow_ones_by_the_factor() -> None:
    plain, slowed = (
        rotary_frequencies(128, ModelConfig(rotary_base=5e5, rope_scaling_type=kind))
        for kind in ("none", "llama3")
    )
    share = slowed / plain
    assert share[0] == 1.0 and share[-1] == 1 / 8
    assert (share.diff() <= 0).all() and ((share > 1 / 8) & (share < 1)).any()


def test_linear_is_positions_divided() -> None:
    model = ModelConfig(rope_scaling_type="linear", rope_scaling_factor=4.0)
    near = rotary_tables(16, ModelConfig(), torch.arange(0, 5))
    far = rotary_tables(16, model, torch.arange(0, 20, 4))
    for ours, expected in zip(far, near, strict=True):
        torch.testing.assert_close(ours, expected)


ARGS = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "padded_vocab_size": 64,
    "max_position_embeddings": 32, "position_embedding_type": "rope",
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "kind", "factor"),
    [
        ({"use_rope_scaling": True}, "llama3", 8.0),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "llama3", 32.0),
        ({"rotary_seq_len_interpolation_factor": 4}, "linear", 4.0),
        ({"use_rope_scaling": False, "rope_scaling_factor": 32.0}, "none", 8.0),
        ({"use_rope_scaling": True, "position_embedding_type": "learned_absolute"}, "none", 8.0),
    ],
)
def test_what_megatrons_checkpoints_say_of_it(
    said: dict[str, Any], kind: str, factor: float
) -> None:
    model = model_of(args_of(ARGS | said, Path("common.pt")))
    assert (model.rope_scaling_type, model.rope_scaling_factor) == (kind, factor)


def test_megatrons_two_ways_at_once_are_refused() -> None:
    both = {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}
    with pytest.raises(CheckpointError, match="only one is built here"):
        model_of(args_of(ARGS | both, Path("common.pt")))


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (lambda p: plan_gguf(p, "llama", None), "--rope-scaling-type llama3"),
        (lambda p: plan_llama2c(p, "llama", None), "--rope-scaling-type llama3, only none"),
    ],
)
def test_formats_without_it_say_so(plan: Any, named: str) -> None:
    if "only" not in named:
        needs("gguf")
    model = ModelConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=64, seq_length=8,
        position_embedding_type="rope", rope_scaling_type="llama3",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=named):
        plan(SimpleNamespace(model=model, family=LLAMA))
