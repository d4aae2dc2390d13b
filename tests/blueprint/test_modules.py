"""Table and modules are built from one figure: every stage's real modules, on the meta device, agree."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from megatron_lite.blueprint.batches import padded_vocab_size
from megatron_lite.blueprint.parameters import parameter_table
from megatron_lite.blueprint.stages import StageLayers, cut_stages
from megatron_lite.config.flags.presets import PRESETS
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.layers.contexts import StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.parallel.shard import LocalParameter

VARIANT = ModelConfig(
    num_layers=4, hidden_size=64, num_attention_heads=8, seq_length=32, vocab_size=301,
    group_query_attention=True, num_query_groups=4, swiglu=True, normalization="RMSNorm",
    add_bias_linear=False, position_embedding_type="rope",
    untie_embeddings_and_output_weights=True, kv_channels=16,
)  # fmt: skip

MODELS = {name: PRESETS[name].model for name in (
    *(name for name in PRESETS if name.startswith("gpt")),
    "llama2-7b", "llama3.2-1b", "mistral-7b", "qwen2.5-0.5b", "qwen3-0.6b", "open-gpt-6.8m",
)} | {"variant": VARIANT, "learned frequencies": replace(VARIANT, rope_scaling_type="clex")}  # fmt: skip
"""One preset of each family; the other sizes differ in numbers alone."""


def locals_of(
    model: ModelConfig, stage: StageLayers, *, padded: int, tp: int, pp: int, split: bool = False
) -> list[LocalParameter]:
    """What tp rank 0 holds of a stage, without memory; split: with sequence parallelism."""
    assert model.vocab_size is not None
    ctx = ParallelContext(
        torch.device("meta"),
        tp=Axis("tp", 0, tp, tuple(range(tp))),
        pp=Axis("pp", stage.index, pp, tuple(range(pp))),
        tied=Axis("tied", size=pp),
    )
    context = StageContext(
        model, ctx, padded_vocab_size=padded, vocab_size=model.vocab_size, sequence_parallel=split
    )
    return local_parameters(
        Decoder(context, stage.layers, has_embedding=stage.has_embedding, has_head=stage.has_head)
    )


def built(
    model: ModelConfig, stage: StageLayers, *, padded: int, tp: int, pp: int
) -> dict[str, tuple]:
    """(shape, tp dim, kind, replica, elements held) by canonical name, from the modules of tp rank 0."""
    assert model.vocab_size is not None
    found = {}
    for local in locals_of(model, stage, padded=padded, tp=tp, pp=pp):
        held = sum(piece.stop - piece.start for piece in local.pieces)
        rest = math.prod(local.parameter.shape[1:])
        assert local.parameter.shape[0] - held <= padded - model.vocab_size
        for piece in local.pieces:
            size = (piece.stop - piece.start) * rest
            found[piece.name] = (piece.shape, local.tp_dim, local.spec.kind, local.replica, size)
    return found


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_stage_of_a_preset_equals_the_table(name: str, pp: int) -> None:
    model = MODELS[name]
    tp = 1 if pp == 1 else min(n for n in (2, 5) if model.num_attention_heads % n == 0)
    assert model.vocab_size is not None
    padded = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, tp)
    stages = cut_stages((model.num_layers // pp,) * pp)
    table = parameter_table(model, stages, padded_vocab_size=padded)
    for stage in stages:
        expected = {}
        for spec in (s for s in table if s.stage == stage.index):
            shape, size = spec.shape, spec.local_size(tp)
            if shape[0] == padded:  # modules report the real rows of the vocabulary only
                shape = (model.vocab_size, *shape[1:])
                size = min(padded // tp, model.vocab_size) * shape[1]
            expected[spec.name] = (shape, spec.tp_dim, spec.tensor.kind, spec.replica, size)
        assert built(model, stage, padded=padded, tp=tp, pp=pp) == expected


def test_with_sequence_parallelism_whole_parameters_have_gradients_that_are_shares() -> None:
    """Norms, positions and the biases added after a row-parallel sum meet this rank's tokens only."""
    model = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=4, vocab_size=10
    )
    (stage,) = cut_stages([1])
    sizes = {"padded": 12, "tp": 2, "pp": 1}
    summed = {
        local.pieces[0].name
        for local in locals_of(model, stage, split=True, **sizes)
        if local.grad_summed_over == ("tp",)
    }
    assert summed == {
        "embedding.positions.weight", "final_norm.weight", "final_norm.bias",
        *(f"blocks.0.{norm}.{leaf}" for norm in ("attention_norm", "mlp_norm")
          for leaf in ("weight", "bias")),
        "blocks.0.attention.output.bias", "blocks.0.mlp.down.bias",
    }  # fmt: skip
    assert not any(
        local.grad_summed_over for local in locals_of(model, stage, split=False, **sizes)
    )
    alone = {"padded": 12, "tp": 1, "pp": 1}
    assert not any(local.grad_summed_over for local in locals_of(model, stage, split=True, **alone))


def drawn_models(count: int = 20) -> list[ModelConfig]:
    """Models of every combination of parts that a seed brings."""
    draw = random.Random(12)
    found = []
    for _ in range(count):
        heads = draw.choice((2, 4, 8))
        groups = draw.choice([n for n in (2, 4, 8) if heads % n == 0])
        found.append(
            ModelConfig(
                num_layers=draw.choice((2, 4)), hidden_size=16 * heads, num_attention_heads=heads,
                group_query_attention=draw.random() < 0.5, num_query_groups=groups,
                kv_channels=draw.choice((None, 8, 24)), seq_length=32,
                ffn_hidden_size=draw.choice((None, 48, 80)), swiglu=draw.random() < 0.5,
                normalization=draw.choice(("LayerNorm", "RMSNorm")),
                layernorm_bias=draw.random() < 0.5, add_bias_linear=draw.random() < 0.5,
                add_qkv_bias=draw.random() < 0.5, qk_layernorm=draw.random() < 0.5,
                position_embedding_type=draw.choice(("learned_absolute", "rope", "none")),
                untie_embeddings_and_output_weights=draw.random() < 0.5,
                vocab_size=draw.randrange(200, 400),
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("model", [
    pytest.param(model, id=str(number)) for number, model in enumerate(drawn_models())
])  # fmt: skip
def test_a_drawn_model_is_its_figure(model: ModelConfig) -> None:
    """Names, shapes and sizes of the modules are those of the figure's tensors, cut over tp 2."""
    assert model.vocab_size is not None
    padded = padded_vocab_size(model.vocab_size, 8, 2)
    (stage,) = cut_stages([model.num_layers])
    found = [
        (piece.name, piece.shape, piece.stop - piece.start)
        for local in locals_of(model, stage, padded=padded, tp=2, pp=1)
        for piece in local.pieces
    ]
    expected = []
    for spec in parameter_table(model, [stage], padded_vocab_size=padded):
        rows = spec.shape[0] // (2 if spec.tp_dim == 0 else 1)
        shape = (model.vocab_size, *spec.shape[1:]) if spec.tensor.vocabulary else spec.shape
        expected.append((spec.name, shape, min(rows, shape[0])))
    assert sorted(found) == sorted(expected)
    assert not any("bias" in name for name, *_ in found) or (
        model.add_bias_linear
        or model.add_qkv_bias
        or (model.layernorm_bias and model.normalization == "LayerNorm")
    )
