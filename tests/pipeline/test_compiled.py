"""--torch-compile under every way to run a backward: split, recomputed, both; numbers do not change.

What is compiled are norms and activations, whose backward belongs to I; a product that waits for
its W is not part of a compiled piece.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_lite.kernels import compiled
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import FULL, PP, SCHEDULE
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

PP2 = {PP: 2}
SELECTIVE = {
    "parallel__recompute_granularity": "selective",
    "parallel__recompute_modules": ["mlp", "layernorm"],
}
WAYS: dict[str, dict[str, Any]] = {
    "1f1b": PP2,
    "zb-h1": PP2 | {SCHEDULE: "zb-h1"},
    "zb-v, all computed again": PP2 | FULL | {SCHEDULE: "zb-v"},
    "zb-v, parts computed again": PP2 | SELECTIVE | {SCHEDULE: "zb-v"},
}


def steps(rank: int, ranks: int, backend: str) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of three steps, each way without and with compilation."""
    compile_with = functools.partial(torch.compile, backend=backend, dynamic=False)
    compiled._compiled = functools.cache(compile_with)  # type: ignore[assignment]
    found = {}
    for name, changes in WAYS.items():
        for on in (False, True):
            config = tiny_config(
                precision__torch_compile=on, model__hidden_dropout=0.1, model__swiglu=True,
                model__normalization="RMSNorm", model__add_bias_linear=False, **changes,
            )  # fmt: skip
            blueprint = draw(config, ranks)
            run = assemble(config, blueprint, context(blueprint, rank))
            seen = []
            for step in range(3):
                run.progress.step = step
                batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
                result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
                seen.append((result.loss.item(), result.update.grad_norm.item()))
            found[f"{name} {'compiled' if on else 'plain'}"] = seen
    return found


@pytest.mark.parametrize(
    "backend",
    [
        # traced, and differentiated as a graph, but not translated to C++: seconds, not a minute
        pytest.param("aot_eager", marks=pytest.mark.ci),
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_pieces_train_alike_under_every_schedule(backend: str) -> None:
    for rank in spawn(steps, 2, backend, deadline=600):
        for name in WAYS:
            for ours, theirs in zip(rank[f"{name} compiled"], rank[f"{name} plain"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5), name
