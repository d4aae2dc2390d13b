"""Weights at the start: GPT-2's distribution, the same numbers whatever the shape of the layout."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.layers.contexts import StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.context import Axis, ParallelContext
from tests.support.models import fill

LAYERS, STD = 8, 0.05
MODEL = ModelConfig(
    num_layers=LAYERS, hidden_size=64, num_attention_heads=4, seq_length=32, vocab_size=500,
    init_method_std=STD,
)  # fmt: skip


def made(tp=1, rank=0, seed=3):
    """name -> (this rank's piece of the tensor, its offset)."""
    ctx = ParallelContext(torch.device("cpu"), tp=Axis("tp", rank, tp, tuple(range(tp))))
    context = StageContext(MODEL, ctx, padded_vocab_size=512, vocab_size=500, seed=seed)
    model = Decoder(context, range(LAYERS), has_embedding=True, has_head=True)
    fill(model)
    return {
        piece.name: (piece.of(local.parameter.detach()), piece.offset)
        for local in local_parameters(model)
        for piece in local.pieces
    }, model


def test_every_tensor_has_gpt2s_distribution() -> None:
    """N(0, std); the two projections into the stream of each layer std / sqrt(2 layers)."""
    tensors, model = made()
    for name, (tensor, _) in tensors.items():
        if name.endswith(".bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            into_stream = name.endswith(("attention.output.weight", "mlp.down.weight"))
            std = STD / math.sqrt(2 * LAYERS) if into_stream else STD
            n = tensor.numel()
            # five standard errors of a variance and of a mean
            assert tensor.double().var().item() == pytest.approx(std**2, rel=5 * (2 / n) ** 0.5)
            assert abs(tensor.double().mean().item()) < 5 * std / n**0.5, name
    assert sum(name.endswith("mlp.down.weight") for name in tensors) == LAYERS
    assert not model.embedding.tokens.weight[500:].any(), "padding rows are zero"


def test_no_two_tensors_are_alike() -> None:
    tensors, _ = made()
    drawn = [t.flatten()[:2000] for n, (t, _) in tensors.items() if t.dim() == 2]
    correlation = torch.corrcoef(torch.stack([t[:2000] for t in drawn])) - torch.eye(len(drawn))
    assert correlation.abs().max() < 6 / math.sqrt(2000)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_tp_rank_has_its_slice_of_the_same_weights(tp) -> None:
    whole, _ = made()
    for rank in range(tp):
        for name, (part, offset) in made(tp, rank)[0].items():
            box = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
            assert torch.equal(part, whole[name][0][box]), name


def test_another_seed_gives_other_weights() -> None:
    one, two = made(seed=1)[0], made(seed=2)[0]
    for name, (tensor, _) in one.items():
        if tensor.dim() == 2:
            assert not torch.equal(tensor, two[name][0]), name
