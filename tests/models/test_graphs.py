"""What stands between two products is one graph for all layers, steps, samples and masks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import step_dropout
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from tests.support.models import fill

LAYERS, STEPS, S, B, H = 10, 12, 6, 2, 16
GPT = ModelConfig(hidden_size=H, num_attention_heads=2, seq_length=S)
LLAMA = dataclasses.replace(
    GPT, ffn_hidden_size=32, normalization="RMSNorm", swiglu=True, add_bias_linear=False,
    position_embedding_type="rope",
)  # fmt: skip
# the two norms, the activation, the end of a block; turning q and k
GRAPHS = {"gpt": (GPT, 4), "llama": (LLAMA, 5)}


def trained(model: ModelConfig, compiler: Compiler | None) -> torch.Tensor:
    """Gradients of the blocks' parameters, summed over steps of one micro batch each."""
    context = StageContext(
        model, ParallelContext.serial(), padded_vocab_size=8, vocab_size=8, compiler=compiler
    )
    blocks = Decoder(context, range(model.num_layers), has_embedding=False, has_head=False)
    fill(blocks)
    x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for step in range(STEPS):
        at = ForwardContext(
            samples=torch.arange(step * B, (step + 1) * B), index=torch.arange(S),
            first_sample=step * B, dropout=step_dropout(context, step),
        )  # fmt: skip
        blocks(x, at).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in blocks.parameters() if p.grad is not None])


@pytest.mark.parametrize(("name", "dropout"), [
    ("gpt", 0.1), pytest.param("gpt", 0.0, marks=pytest.mark.ci),
    pytest.param("llama", 0.0, marks=pytest.mark.ci),
    pytest.param("llama", 0.1, marks=pytest.mark.ci),
])  # fmt: skip
def test_graphs_are_as_many_whatever_the_layers_steps_and_dropout(
    name: str, dropout: float
) -> None:
    model, graphs = GRAPHS[name]
    model = dataclasses.replace(
        model, num_layers=LAYERS, hidden_dropout=dropout, attention_dropout=dropout
    )
    torch._dynamo.reset()
    counters.clear()
    compiler = Compiler("eager")
    found = trained(model, compiler)
    assert compiler.failure is None
    assert counters["stats"]["unique_graphs"] == graphs == len(compiler.pieces)
    assert not counters["graph_break"]
    assert torch.equal(found, trained(model, None))
