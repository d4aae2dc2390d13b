"""The pieces between two products are one graph for all layers, steps, samples and masks."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels.table import TABLE
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import HiddenDropout, step_dropout
from megatron_lite.parallel.context import ParallelContext

LAYERS, STEPS, S, B, H = 10, 12, 6, 2, 16


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("op", ["add_dropout", "add_dropout_layer_norm", "add_dropout_rms_norm"])
def test_dropout_compiles_once_for_all_steps_and_layers(op: str, backend: str) -> None:
    model = ModelConfig(num_layers=LAYERS, hidden_size=H, num_attention_heads=2, seq_length=S,
                        hidden_dropout=0.1)  # fmt: skip
    context = StageContext(model, ParallelContext.serial(), padded_vocab_size=8, vocab_size=8)
    sites = [HiddenDropout(context, layer, "mlp.output") for layer in range(LAYERS)]
    reference = TABLE[op][-1].run
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(reference, backend=backend, dynamic=False, fullgraph=True)
    x, y = (torch.randn(S, B, H, requires_grad=True) for _ in range(2))
    norm = [] if op == "add_dropout" else [torch.ones(H, requires_grad=True), None, 1e-5]
    for step in range(STEPS):
        at = ForwardContext(
            samples=torch.arange(step * B, (step + 1) * B), index=torch.arange(S),
            first_sample=step * B, dropout=step_dropout(context, step),
        )  # fmt: skip
        for site in sites:
            found = []
            for run in (compiled, reference):
                results = run(x, y, None, site.call(at), *norm)
                results = results if isinstance(results, tuple) else (results,)
                loss = torch.stack([result.square().sum() for result in results]).sum()
                found.append([*results, *torch.autograd.grad(loss, [x, y])])
            for ours, theirs in zip(*found, strict=True):
                assert torch.equal(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
