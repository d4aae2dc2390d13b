"""Rotary frequencies: what transformers computes, in fp64 here and fp32 there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lite.blueprint.rotary import ntk_base
from megatron_lite.checkpoint.foreign.gguf import plan_gguf
from megatron_lite.checkpoint.foreign.llama2c import plan_llama2c
from megatron_lite.checkpoint.foreign.megatron_args import args_of, model_of
from megatron_lite.checkpoint.huggingface.llama import LLAMA
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import BY_LENGTH, ModelConfig
from megatron_lite.layers.rotary import rotary_frequencies, rotary_tables
from tests.support.extras import needs

NAMES = {
    "rope_original_length": "original_max_position_embeddings", "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor", "rope_beta_fast": "beta_fast", "rope_beta_slow": "beta_slow",
    "rope_whole_channels": "truncate", "rope_attention_factor": "attention_factor",
    "rope_short_factors": "short_factor", "rope_long_factors": "long_factor",
}  # fmt: skip
"""Our parameters of a type -> transformers'."""

LLAMA31 = {"rope_original_length": 8192, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
LISTS = {
    name: ",".join(str(start + 0.125 * pair) for pair in range(64))
    for name, start in (("rope_short_factors", 1.0), ("rope_long_factors", 2.0))
}
TYPES = {
    "linear": ("linear", {}),
    "llama3": ("llama3", LLAMA31),
    "llama3, short": ("llama3", LLAMA31 | {"rope_original_length": 100}),
    "dynamic": ("dynamic", {}),
    "yarn": ("yarn", {"rope_original_length": 4096}),
    "yarn, short": ("yarn", {"rope_original_length": 64, "rope_beta_fast": 8.0}),
    "yarn of gpt-oss": ("yarn", {
        "rope_original_length": 4096, "rope_whole_channels": False, "rope_beta_slow": 2.0}),
    "yarn, steps in one channel": ("yarn", {"rope_original_length": 2, "rope_beta_fast": 2.0}),
    "yarn, factor given": ("yarn", {"rope_original_length": 4096, "rope_attention_factor": 1.25}),
    "longrope": ("longrope", LISTS | {"rope_original_length": 4096}),
    "longrope, factor given": ("longrope", LISTS | {
        "rope_original_length": 4096, "rope_attention_factor": 1.25}),
}  # fmt: skip
LENGTHS = (4000, 4096, 4097, 50_000)
"""Of texts, about a trained length of 4096."""


def theirs(kind: str, factor: float, share: float, said: dict[str, Any]) -> Any:
    """transformers' config of the same."""
    words: dict[str, Any] = {NAMES[name]: value for name, value in said.items()}
    for name in ("short_factor", "long_factor"):
        if name in words:
            words[name] = [float(word) for word in words[name].split(",")]
    positions = 4096 if kind == "dynamic" else 1 << 17
    return needs("transformers").LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=positions,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, "factor": factor,
                         "partial_rotary_factor": share, **words},
    )  # fmt: skip


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("name", TYPES)
def test_frequencies_and_attention_factor_are_those_of_transformers(
    name: str, share: float, factor: float
) -> None:
    kind, said = TYPES[name]
    channels = int(128 * share)
    said = {
        key: ",".join(value.split(",")[: channels // 2]) if key in LISTS else value
        for key, value in said.items()
    }
    oracle = needs("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    config = theirs(kind, factor, share, said)
    model = ModelConfig(
        rotary_base=5e5, rope_scaling_type=kind, rope_scaling_factor=factor,  # type: ignore[arg-type]
        **({"rope_original_length": 4096} if kind == "dynamic" else {}), **said,
    )  # fmt: skip
    for length in LENGTHS if kind in BY_LENGTH else (None,):
        expected, scale = oracle(config, seq_len=length)
        found = rotary_frequencies(channels, model, length=length)
        assert model.rotary_scale == pytest.approx(scale, rel=1e-12)
        torch.testing.assert_close(found.float(), expected, rtol=3e-6, atol=0.0)


def test_yarn_at_its_paper_s_settings() -> None:
    """Recorded from an implementation of the formulas in NumPy, of a head of 64 trained at 2048."""
    model = ModelConfig(
        rope_scaling_type="yarn", rope_scaling_factor=8.0, rope_original_length=2048
    )
    found = rotary_frequencies(64, model)
    plain = rotary_frequencies(64, ModelConfig())
    expected = {10: 4.86641531e-2, 16: 4.61538462e-3, 31: 1.66690179e-5}
    assert {n: float(found[n]) for n in expected} == pytest.approx(expected, rel=1e-8)
    assert model.rotary_scale == pytest.approx(1.20794415, rel=1e-8)
    ramp = (1.0 - found / plain) / (1.0 - 1.0 / 8.0)
    assert ramp[8] == 0.0 < ramp[9] and ramp[20] < 1.0 == pytest.approx(float(ramp[21]))


@pytest.mark.parametrize(("factor", "base"), [(2.0, 20452.23), (3.0, 31082.2367), (4.0, 41829.37)])
def test_ntk_is_another_base_and_the_slowest_channel_slowed_by_the_factor(
    factor: float, base: float
) -> None:
    assert ntk_base(1e4, factor, 64) == pytest.approx(base, rel=1e-6)
    model = ModelConfig(rope_scaling_type="ntk", rope_scaling_factor=factor)
    found = rotary_frequencies(64, model)
    enlarged = ModelConfig(rotary_base=ntk_base(1e4, factor, 64))
    assert torch.equal(found, rotary_frequencies(64, enlarged))
    share = found / rotary_frequencies(64, ModelConfig())
    assert share[0] == 1.0 and float(share[-1]) == pytest.approx(1 / factor)


def test_dynamic_is_ntk_of_what_the_text_is_longer() -> None:
    def model(kind: Any, factor: float) -> ModelConfig:
        return ModelConfig(
            rope_scaling_type=kind, rope_scaling_factor=factor, rope_original_length=100
        )

    expected = rotary_frequencies(64, model("ntk", 3.0))  # 2 * 200 / 100 - (2 - 1)
    assert torch.equal(rotary_frequencies(64, model("dynamic", 2.0), length=200), expected)


@pytest.mark.parametrize("kind", sorted(BY_LENGTH))
def test_each_sample_goes_by_its_own_length(kind: Any) -> None:
    lists = {name: text.rsplit(",", 56)[0] for name, text in LISTS.items()}
    model = ModelConfig(rope_scaling_type=kind, rope_original_length=10,
                        **(lists if kind == "longrope" else {}))  # fmt: skip
    index = torch.arange(5)
    both = rotary_tables(16, model, index, (8, 40))
    for sample, length in enumerate((8, 40)):
        for found, alone in zip(both, rotary_tables(16, model, index, length), strict=True):
            assert torch.equal(found[:, sample], alone[:, 0])
    assert not torch.equal(both[0][:, 0], both[0][:, 1])
    with pytest.raises(AssertionError, match="length of the whole text must be known"):
        rotary_tables(16, model, index)


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


@pytest.mark.parametrize(
    ("said", "scale"),
    [({}, 1.13862944), ({"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}, 1.13862944),
     ({"yarn_mscale": 1.0, "yarn_mscale_all_dim": 1.0}, 1.0),
     ({"yarn_mscale": 0.707, "yarn_mscale_all_dim": 0.5}, 1.02683615)],
)  # fmt: skip
def test_megatrons_yarn_is_a_kind_of_positions(said: dict[str, Any], scale: float) -> None:
    model = model_of(args_of(ARGS | said | {
        "position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 16, "yarn_beta_fast": 8.0, "yarn_beta_slow": 0.5,
        "yarn_correction_range_round_to_int": False,
    }, Path("common.pt")))  # fmt: skip
    assert (model.position_embedding_type, model.rope_scaling_type) == ("rope", "yarn")
    assert (model.rope_scaling_factor, model.rope_original_length) == (4.0, 16)
    assert (model.rope_beta_fast, model.rope_beta_slow) == (8.0, 0.5)
    assert not model.rope_whole_channels and model.rotary_scale == pytest.approx(scale)


def test_megatrons_ways_at_once_are_refused() -> None:
    both = {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}
    with pytest.raises(CheckpointError, match="only one of them is built here"):
        model_of(args_of(ARGS | both, Path("common.pt")))


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (lambda p: plan_gguf(p, "qwen2", None), "--rope-scaling-type llama3"),
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
