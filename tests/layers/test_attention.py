"""The attention kernel of a stage, and the line that names what really runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.kernels import vendor
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.layers.attention import attention_line, choose_attention
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, FULL
from tests.support.tiny import draw, make_batches, tiny_config

ON_A_CPU = "attention: flash-attn no (needs a GPU) -> "


def stage(
    capability: tuple[int, int] | None = None, compiler: Compiler | None = None, **changes: Any
) -> StageContext:
    config = tiny_config(**changes)
    return StageContext(
        config.model, ParallelContext.serial(), padded_vocab_size=8, vocab_size=8,
        precision=config.precision, capability=capability, compiler=compiler,
    )  # fmt: skip


@pytest.mark.parametrize(("segments", "changes", "line"), [
    (False, {}, f"{ON_A_CPU}torch-sdpa (flash)"),
    (False, {BF16: True}, f"{ON_A_CPU}torch-sdpa (flash)"),
    (True, {}, f"{ON_A_CPU}torch-flex no (needs a GPU) -> torch-varlen no (needs a GPU) -> torch-sdpa (flash)"),
    (False, {"model__attention_dropout": 0.1},
     f"{ON_A_CPU}torch-sdpa no (attention dropout on a CPU is exact only in the reference) -> reference"),
    (False, {"precision__attention_backend": "unfused"}, "attention: reference"),
])  # fmt: skip
def test_the_line_at_start_names_what_runs(
    segments: bool, changes: dict[str, Any], line: str
) -> None:
    assert attention_line(stage(**changes), 2, segments=segments) == line


def test_torch_is_asked_about_the_runs_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Tensor, Tensor, AttentionCall]] = []

    def note(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> str:
        asked.append((q, k, call))
        return vendor.sdpa_kernel(q, k, v, call)

    monkeypatch.setattr("megatron_lite.layers.attention.sdpa_kernel", note)
    context = stage(**{BF16: True})
    attention_line(context, 3, segments=False)
    ((q, k, call),) = asked
    model = context.model
    shape = (3, model.num_attention_heads, model.seq_length, model.head_size)
    assert q.shape == shape and k.shape == (3, model.num_kv_heads, *shape[2:])
    assert q.dtype == torch.bfloat16 and q.requires_grad and call.dropout == model.attention_dropout


@pytest.mark.parametrize(("capability", "compiled", "name"), [
    ((9, 0), True, "torch-flex"), ((9, 0), False, "torch-varlen"), (None, True, "torch-sdpa"),
])  # fmt: skip
def test_a_stage_knows_its_gpu_and_its_rows(
    capability: tuple[int, int] | None, compiled: bool, name: str
) -> None:
    context = stage(
        capability, Compiler() if compiled else None, **{BF16: True}, model__hidden_size=64,
        model__seq_length=1024, model__num_attention_heads=4,
    )  # fmt: skip
    assert choose_attention(context, training=True, segments=True).implementation.name == name


def stepped(**changes: Any) -> tuple[str, str]:
    """Loss and gradient norm of a step with rotary positions, to the last bit."""
    config = tiny_config(model__position_embedding_type="rope", **changes)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, ParallelContext.serial())
    done = train_step(run, make_batches(config, blueprint, 0, 0), lr=1e-2, weight_decay=0.1)
    return float(done.loss).hex(), float(done.update.grad_norm).hex()


@pytest.mark.parametrize("changes", [{}, FULL], ids=["all kept", "recomputed"])
def test_the_angles_are_made_once_for_all_layers_of_a_micro_batch(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    once = ForwardContext.once

    def noted(at: ForwardContext, what: Any, make: Callable[[], Any]) -> Any:
        return once(at, what, lambda: made.append(what) or make())

    monkeypatch.setattr(ForwardContext, "once", noted)
    shared = stepped(**changes)
    blueprint = draw(tiny_config(), 1)
    angles = [what for what in made if what[0] == "angles"]
    assert len(angles) == blueprint.microbatches() and blueprint.model.num_layers > 1
    made.clear()
    monkeypatch.setattr(ForwardContext, "once", lambda at, what, make: made.append(what) or make())
    assert stepped(**changes) == shared
    assert len(made) > 2 * blueprint.microbatches()
