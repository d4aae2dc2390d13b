"""Compiled pieces under every schedule and every way to run a backward give an eager run's numbers.

A product that waits for its W keeps factors beyond the life of the graphs that made them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, CHUNKS, FULL, PP, SCHEDULE, SP, TP, ZERO
from tests.support.checkpoints import save, train
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

PP2 = {PP: 2}
SELECTIVE = {
    "parallel__recompute_granularity": "selective",
    "parallel__recompute_modules": ["mlp", "layernorm"],
}
LLAMA = {
    "model__swiglu": True, "model__normalization": "RMSNorm", "model__add_bias_linear": False,
    "model__position_embedding_type": "rope",
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "1f1b": PP2,
    "gpipe": PP2 | {SCHEDULE: "gpipe"},
    "interleaved": PP2 | LLAMA | {CHUNKS: 2},
    "zb-h1": PP2 | LLAMA | {SCHEDULE: "zb-h1"},
    "zb-v": PP2 | {SCHEDULE: "zb-v"},
    "zb-v, all computed again": PP2 | LLAMA | FULL | {SCHEDULE: "zb-v"},
    "zb-v, parts computed again": PP2 | LLAMA | SELECTIVE | {SCHEDULE: "zb-v"},
    "sequence parallel, documents, attention dropout": {
        TP: 2, SP: True, "data__reset_attention_mask": True, "data__reset_position_ids": True,
        "model__attention_dropout": 0.1, "precision__attention_backend": "unfused",
    } | LLAMA,
    "sharded, gathered before use": {ZERO: 1, "parallel__overlap_param_gather": True},
    "bf16": PP2 | {BF16: True, SCHEDULE: "zb-h1"},
}  # fmt: skip


def steps(rank: int, ranks: int, backend: str, names: list[str]) -> dict[str, list[list[float]]]:
    """Losses and gradient norms of two steps in every way, as they are and compiled."""
    found = {}
    for name in names:
        curves = []
        for switch in ("off", "on"):
            config = tiny_config(
                precision__torch_compile=switch, model__hidden_dropout=0.1, **WAYS[name]
            )
            blueprint = draw(config, ranks)
            compiler = Compiler(backend)
            run = assemble(config, blueprint, context(blueprint, rank), compiler=compiler)
            seen = []
            for step in range(2):
                run.progress.step = step
                batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
                result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
                seen += [result.loss.item(), result.update.grad_norm.item()]
            assert compiler.failure is None
            assert bool(compiler.pieces) == (switch == "on")
            curves.append(seen)
        found[name] = curves
    return found


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        # traced, and differentiated as a graph, but not translated to C++: seconds, not a minute
        pytest.param("aot_eager", list(WAYS), marks=pytest.mark.ci),
        pytest.param("inductor", list(WAYS), marks=pytest.mark.slow),
    ],
)
def test_compiled_pieces_train_alike_under_every_schedule(backend: str, names: list[str]) -> None:
    for rank in spawn(steps, 2, backend, names, deadline=600):
        for name, (plain, compiled) in rank.items():
            rel = 2e-2 if name == "bf16" else 1e-5  # a fused kernel rounds once, not at every op
            assert compiled == pytest.approx(plain, rel=rel), name


@pytest.mark.ci
def test_names_in_a_checkpoint_are_those_of_a_run_that_is_not_compiled(tmp_path: Path) -> None:
    """Modules, tensors and the optimizer's states: nobody sees the compiler around a piece."""
    names: dict[str, list[list[str]]] = {}
    for switch in ("off", "on"):
        config = tiny_config(precision__torch_compile=switch, model__hidden_dropout=0.1)
        blueprint = draw(config, 1)
        compiler = Compiler("eager")  # traced, and run as traced
        run = assemble(config, blueprint, context(blueprint, 0), compiler=compiler)
        train(config, blueprint, run, 1)
        assert compiler.failure is None and bool(compiler.pieces) == (switch == "on")
        save(run, tmp_path / switch, Progress(1, 1, lr_samples=1, optimizer_steps=1))
        (folder,) = (tmp_path / switch).glob("iter_*")
        names[switch] = [
            [name for stage in run.pipeline.stages.values() for name in stage.module.state_dict()],
            [piece.spec.name for local in run.parameters for piece in local.pieces],
            sorted(read_manifest(folder).tensors),
        ]
    assert names["on"] == names["off"] and all(names["on"])
    assert not any("_orig_mod" in name for kind in names["on"] for name in kind)
