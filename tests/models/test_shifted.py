"""S2-attention in a whole model: causal in training, full in evaluation and in use, cheaper in the plan."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.flops import core_forward
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels.segments import Segments
from megatron_lite.layers.attention import attention_line
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from tests.support.models import fill

S = 16
GROUPED = ModelConfig(
    num_layers=2, hidden_size=24, num_attention_heads=6, seq_length=S, vocab_size=31,
    hidden_dropout=0.0, attention_dropout=0.0, s2_attention=True, position_embedding_type="rope",
    group_query_attention=True, num_query_groups=2,
)  # fmt: skip
FULL = dataclasses.replace(GROUPED, s2_attention=False)


def model_of(config: ModelConfig) -> Decoder:
    context = StageContext(config, ParallelContext.serial(), padded_vocab_size=32, vocab_size=31)
    model = Decoder(context, range(config.num_layers), has_embedding=True, has_head=True)
    fill(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    return model


def at(*, training: bool, segments: Segments | None = None) -> ForwardContext:
    return ForwardContext(
        samples=torch.arange(2), index=torch.arange(S), training=training, segments=segments
    )


TOKENS = torch.randint(0, 31, (S, 2), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("documents", [False, True])
def test_no_tokens_loss_reaches_a_later_token(documents: bool) -> None:
    """Through two layers, so also by way of groups that hear of one another."""
    model = model_of(GROUPED)
    seen: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda _, __, x: seen.append(x) or x.retain_grad())
    borders = torch.tensor([0, 5, 16, 27, 32], dtype=torch.int32)
    segments = Segments(borders, 11, 2, S) if documents else None
    for i in range(S):
        logits = model(TOKENS, at(training=True, segments=segments))
        logits[i].square().sum().backward()
        gradient = seen[-1].grad
        assert (gradient[i + 1 :] == 0).all(), i
        assert (gradient[i] != 0).any()
        first = gradient[0, 0].abs().sum()
        # groups of 4, and from token 3 of the first those moved by 2, in the second layer
        assert (first > 0) == (i < (5 if documents else 6)), i


def test_evaluation_and_use_see_all() -> None:
    grouped, full = model_of(GROUPED), model_of(FULL)
    with torch.no_grad():
        trained, evaluated = (grouped(TOKENS, at(training=t)) for t in (True, False))
        for training in (True, False):
            assert torch.equal(full(TOKENS, at(training=training)), evaluated)
    # a sample's first half group is seen whole in either
    torch.testing.assert_close(trained[:2], evaluated[:2])
    assert not torch.allclose(trained[4:], evaluated[4:], atol=1e-2)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_flops_count_the_pairs_that_are_computed(size: int) -> None:
    model = dataclasses.replace(GROUPED, s2_group_size=size)
    pairs = 3 * S * size + 3 * (S * size - size * size // 2)  # three heads each, as squares
    (layer, _) = figure_of(model, 64).layers
    assert core_forward(layer, S) == 4 * 4 * pairs // S
    assert core_forward(layer, S, "causal") == 2 * 4 * pairs // S
    assert core_forward(layer, S) < core_forward(figure_of(FULL, 64).layers[0], S)


def test_the_line_at_start_says_so() -> None:
    said = attention_line(model_of(GROUPED).context, 2, segments=False)
    assert "training in groups of 4 tokens, in 3 of 6 heads moved by 2 (--s2-attention)" in said
