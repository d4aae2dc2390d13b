"""Presets are the published models."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from megatron_lite.blueprint.figure.parts import POSITIONS
from megatron_lite.blueprint.parameters import parameter_table, total_size
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.checkpoint.huggingface.rotary_keys import rotary_out
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.presets import PRESETS
from megatron_lite.config.rules.table import model_problems
from megatron_lite.config.sections.model import ModelConfig

COUNTS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "macrogpt-1.3b": 1_473_471_488,
    "baby-llama-58m": 58_479_616,
    "baby-llama-218m": 218_155_008,
    "gpt-from-zero-300m": 336_128_000,
    "open-gpt-6.8m": 6_832_768,  # without its positions
}
"""Parameters as released, each counted once."""


def model_of(name: str) -> ModelConfig:
    return parse(["--preset", name]).config.model


def parameters(model: ModelConfig, *, positions: bool = True) -> int:
    """Its tensors as the blueprint has them, the vocabulary not padded."""
    assert model.vocab_size is not None
    table = parameter_table(
        model, cut_stages([model.num_layers]), padded_vocab_size=model.vocab_size
    )
    counted = [s for s in table if positions or not s.name.startswith(POSITIONS)]
    return total_size(counted)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameters_equal_the_published_counts(name: str, count: int) -> None:
    assert parameters(model_of(name), positions=name != "open-gpt-6.8m") == count


def test_gpt3_at_the_vocabulary_that_megatron_deepspeed_pads_it_to() -> None:
    assert parameters(replace(model_of("gpt3-175b"), vocab_size=51200)) == 174_615_846_912


@pytest.mark.parametrize("name", PRESETS)
def test_the_name_says_the_size_and_the_parts_fit(name: str) -> None:
    amount, unit = name.split("-")[-1][:-1], name[-1]
    expected = float(amount) * {"m": 1e6, "b": 1e9}[unit]
    # named after the layers alone, after the author's guess, and rounded down by its makers
    near = {"macrogpt-1.3b": 0.14, "gpt-from-zero-300m": 0.13, "llama3.2-1b": 0.24}
    model = model_of(name)
    assert abs(parameters(model) / expected - 1) < near.get(name, 0.09)
    assert model_problems(model) == []
    assert model.head_size in (32, 64, 80, 96, 128)
    assert PRESETS[name].source


def test_a_command_line_with_nothing_but_a_preset_is_that_model() -> None:
    """Nothing that flags imply changes it."""
    for name, row in PRESETS.items():
        assert model_of(name) == row.model, name


@pytest.mark.parametrize(
    ("name", "factor"), [("llama3-405b", 8.0), ("llama3.2-1b", 32.0), ("llama3.2-3b", 32.0)]
)
def test_llama_is_stretched_as_in_its_released_config(name: str, factor: float) -> None:
    """As config.json of Llama 3.1 and 3.2 has it; 3 has no scaling."""
    model = model_of(name)
    assert rotary_out(model)["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    assert (model.seq_length, model.num_positions) == (8192, 131072)
    assert model_of("llama3-8b").rope_scaling_type == "none"


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("", 32000),
        ("--tokenizer-type Llama2Tokenizer", 32000),
        ("--tokenizer-type Llama2Tokenizer --tokenizer-model my.model", None),
        ("--tokenizer-type Llama2Tokenizer --tokenizer-model my.model --vocab-size 32000", 32000),
        ("--vocab-file vocab.json --merge-file merges.txt", None),
        ("--tokenizer-type NullTokenizer", 32000),
    ],
)
def test_a_preset_s_vocabulary_gives_way_to_a_tokenizer(words: str, rows: int | None) -> None:
    """None: the tokenizer's ids are counted when the run starts."""
    parsed = parse(["--preset", "llama2-7b", *words.split()])
    assert parsed.config.model.vocab_size == rows
    said = [line for line in parsed.notices if "32,000" in line]
    assert len(said) == (rows is None)
    assert not said or re.search("preset llama2-7b.*tokenizer.*--vocab-size", said[0])
