"""The parameter table is the one double entry: every stage's real modules, on the meta device, agree."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lite.blueprint.batches import padded_vocab_size
from megatron_lite.blueprint.parameters import parameter_table
from megatron_lite.blueprint.stages import Stage, cut_stages
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.presets import PRESETS
from megatron_lite.layers.setting import Setting
from megatron_lite.models.decoder import Decoder, local_parameters
from megatron_lite.parallel.context import Axis, ParallelContext

VARIANT = ModelConfig(
    num_layers=4, hidden_size=64, num_attention_heads=8, seq_length=32, vocab_size=301,
    group_query_attention=True, num_query_groups=4, swiglu=True, normalization="RMSNorm",
    add_bias_linear=False, position_embedding_type="rope",
    untie_embeddings_and_output_weights=True, kv_channels=16,
)  # fmt: skip

MODELS = {
    name: ModelConfig(**{key.removeprefix("model."): value for key, value in values.items()})
    for name, values in PRESETS.items()
} | {"variant": VARIANT}


def built(model: ModelConfig, stage: Stage, *, padded: int, tp: int, pp: int) -> dict[str, tuple]:
    """(shape, tp dim, kind, replica, elements held) by canonical name, from the modules of tp rank 0."""
    assert model.vocab_size is not None
    ctx = ParallelContext(
        torch.device("meta"),
        tp=Axis("tp", 0, tp, tuple(range(tp))),
        tied=Axis("tied", size=pp),
    )
    setting = Setting(model, ctx, padded_vocab_size=padded, vocab_size=model.vocab_size)
    decoder = Decoder(
        setting, stage.layers, has_embedding=stage.has_embedding, has_head=stage.has_head
    )
    found = {}
    for local in local_parameters(decoder):
        held = sum(piece.stop - piece.start for piece in local.pieces)
        rest = math.prod(local.parameter.shape[1:])
        assert local.parameter.shape[0] - held <= padded - model.vocab_size
        for piece in local.pieces:
            size = (piece.stop - piece.start) * rest
            found[piece.name] = (piece.shape, local.tp_dim, local.kind, local.replica, size)
    return found


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_stage_of_every_preset_equals_the_table(name: str, pp: int) -> None:
    model = MODELS[name]
    tp = 1 if pp == 1 else min(n for n in (2, 5) if model.num_attention_heads % n == 0)
    assert model.vocab_size is not None
    padded = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, tp)
    stages = cut_stages((model.num_layers // pp,) * pp)
    table = parameter_table(model, stages, padded_vocab_size=padded, tp=tp)
    for stage in stages:
        expected = {}
        for spec in (s for s in table if s.stage == stage.index):
            shape, size = spec.shape, spec.local_size(tp)
            if shape[0] == padded:  # modules report the real rows of the vocabulary only
                shape = (model.vocab_size, *shape[1:])
                size = min(padded // tp, model.vocab_size) * shape[1]
            expected[spec.name] = (shape, spec.tp_dim, spec.kind, spec.replica, size)
        assert built(model, stage, padded=padded, tp=tp, pp=pp) == expected
