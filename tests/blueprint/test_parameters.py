"""The parameter table against published counts."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.holdings import holding
from megatron_lite.blueprint.parameters import ParamSpec, parameter_table, total_size
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.optim import OptimConfig
from tests.blueprint.configs import GPT3_175B

SMALL = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=4, seq_length=6)


def table(model: ModelConfig, pp: int = 1, vocab: int = 51200) -> tuple[ParamSpec, ...]:
    stages = cut_stages((model.num_layers // pp,) * pp)
    return parameter_table(model, stages, padded_vocab_size=vocab)


def held(specs: tuple[ParamSpec, ...], stages: list[int], tp: int) -> int:
    return holding(specs, stages, tp=tp, optim=OptimConfig()).parameters


@pytest.mark.parametrize("pp", [1, 8])
def test_gpt3_175b_has_174_615_846_912_parameters(pp: int) -> None:
    assert total_size(table(GPT3_175B, pp)) == 174_615_846_912


def test_gpt2_has_the_parameters_of_the_released_weights() -> None:
    gpt2 = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024)
    assert total_size(table(gpt2, vocab=50257)) == 124_439_808


def test_llama_3_8b_has_8_030_261_248_parameters() -> None:
    llama = ModelConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, group_query_attention=True,
        num_query_groups=8, ffn_hidden_size=14336, seq_length=8192, swiglu=True,
        normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    assert total_size(table(llama, vocab=128256)) == 8_030_261_248


@pytest.mark.parametrize(("stage", "billions"), [(0, 2.823), (3, 2.719), (7, 2.798)])
def test_users_ranks_hold_what_megatron_reports(stage: int, billions: float) -> None:
    assert round(held(table(GPT3_175B, 8), [stage], 8) / 1e9, 3) == billions


def test_names_shapes_and_cuts_of_a_small_model() -> None:
    h, f, v = 8, 32, 16
    specs = {spec.name: spec for spec in table(SMALL, vocab=v)}
    block = [name for name in specs if name.startswith("blocks.1.")]
    assert {name: (specs[name].shape, specs[name].tp_dim) for name in block} == {
        "blocks.1.attention_norm.weight": ((h,), None),
        "blocks.1.attention_norm.bias": ((h,), None),
        "blocks.1.attention.q.weight": ((h, h), 0),
        "blocks.1.attention.q.bias": ((h,), 0),
        "blocks.1.attention.k.weight": ((h, h), 0),
        "blocks.1.attention.k.bias": ((h,), 0),
        "blocks.1.attention.v.weight": ((h, h), 0),
        "blocks.1.attention.v.bias": ((h,), 0),
        "blocks.1.attention.output.weight": ((h, h), 1),
        "blocks.1.attention.output.bias": ((h,), None),
        "blocks.1.mlp_norm.weight": ((h,), None),
        "blocks.1.mlp_norm.bias": ((h,), None),
        "blocks.1.mlp.up.weight": ((f, h), 0),
        "blocks.1.mlp.up.bias": ((f,), 0),
        "blocks.1.mlp.down.weight": ((h, f), 1),
        "blocks.1.mlp.down.bias": ((h,), None),
    }
    assert [n for n in specs if not n.startswith("blocks.")] == [
        "embedding.tokens.weight", "embedding.positions.weight",
        "final_norm.weight", "final_norm.bias",
    ]  # fmt: skip
    assert specs["embedding.positions.weight"].shape == (6, h)


def test_kinds_decide_weight_decay() -> None:
    kinds = {s.name.partition(".1.")[2] or s.name: s.tensor.kind for s in table(SMALL, vocab=16)}
    assert kinds["attention_norm.bias"] == kinds["final_norm.weight"] == "norm"
    assert kinds["attention.q.bias"] == "bias"
    assert kinds["attention.q.weight"] == "weight"
    assert kinds["embedding.positions.weight"] == kinds["embedding.tokens.weight"] == "embedding"


def test_options_change_the_table() -> None:
    other = dataclasses.replace(
        SMALL, normalization="RMSNorm", add_bias_linear=False, swiglu=True, ffn_hidden_size=12,
        group_query_attention=True, num_query_groups=2, position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    specs = {spec.name: spec for spec in table(other, vocab=16)}
    assert not [name for name in specs if name.endswith(".bias")]
    assert specs["blocks.0.mlp.gate.weight"].shape == (12, 8)
    assert specs["blocks.0.attention.k.weight"].shape == (4, 8)
    head = Tensor("head.weight", (16, 8), "weight", cuts=(("tp", 0),), vocabulary=True)
    assert specs["head.weight"] == ParamSpec(head, stage=0)
    assert "embedding.positions.weight" not in specs


def test_the_tied_copy_on_the_last_stage_is_a_replica_counted_once() -> None:
    split, whole = table(SMALL, pp=2, vocab=16), table(SMALL, vocab=16)
    copies = [spec for spec in split if spec.name == "embedding.tokens.weight"]
    assert [(spec.stage, spec.replica) for spec in copies] == [(0, False), (1, True)]
    assert total_size(split) == total_size(whole)
    assert held(split, [0], 1) + held(split, [1], 1) == total_size(whole) + 16 * 8
    assert held(split, [0, 1], 1) == total_size(whole)


def test_tp_ranks_together_hold_the_model_and_copies_of_what_is_not_cut() -> None:
    specs = table(SMALL, vocab=16)
    whole = sum(s.size for s in specs if s.tp_dim is None)
    assert 4 * held(specs, [0], 4) == total_size(specs) + 3 * whole
