"""A step on packed documents makes no square of the sequence, but where a kernel asks for a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.data.batch import Batch, collate
from megatron_lite.data.documents import DocumentEnds
from megatron_lite.data.samples import Sample
from megatron_lite.kernels import reference, segments
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.table import PREFERENCES, TABLE, Implementation
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import evaluation_step, train_step
from tests.support.axes import FULL, SCHEDULE
from tests.support.kernels import ON_A_CPU
from tests.support.sizes import VOCAB
from tests.support.tiny import draw, tiny_config

LENGTH = 20
"""No other size of the tiny model."""

RECOMPUTED = {
    "all kept": {},
    "full": FULL,
    "selective": {"parallel__recompute_granularity": "selective"},
}


class Squares(TorchDispatchMode):
    """Counts the tensors that an operation makes for every pair of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = self.others = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.shape[-2:] == (LENGTH, LENGTH):
                self.masks += func is torch.ops.aten.eq.Tensor
                self.others += 1
        return made


def by_segment(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """One document after the other, found by the cumulative lengths alone."""
    packed = call.segments
    assert packed is not None and packed.longest < LENGTH
    flat = [x.permute(1, 0, 2, 3).flatten(1, 2) for x in (q, k, v)]  # [n, b s, d]
    borders = packed.cu_seqlens.tolist()
    pieces = [
        reference.attention(*(x[None, :, begin:end] for x in flat), AttentionCall())[0]
        for begin, end in zip(borders, borders[1:], strict=False)
    ]
    return torch.cat(pieces, dim=1).unflatten(1, (packed.rows, LENGTH)).transpose(0, 1)


def batches() -> list[Batch]:
    """Two micro batches of two rows, each of three documents."""
    random = np.random.default_rng(1)
    rows = [random.integers(0, VOCAB - 1, LENGTH + 1) for _ in range(4)]
    for number, row in enumerate(rows):
        row[[4 + number, 13]] = VOCAB - 1
    ends = DocumentEnds(eod=VOCAB - 1, reset_attention_mask=True)
    return [
        collate([Sample(row) for row in rows[m : m + 2]], np.arange(m, m + 2), ends) for m in (0, 2)
    ]


def numbers(**changes: Any) -> list[float]:
    """Loss, gradient norm and loss in evaluation."""
    config = tiny_config(model__seq_length=LENGTH, train__global_batch_size=4, **changes)
    run = assemble(config, draw(config, 1), ParallelContext.serial())
    trained = train_step(run, batches(), lr=0.0, weight_decay=0.0)
    evaluated = evaluation_step(run, batches())
    return [trained.loss.item(), float(trained.update.grad_norm), float(evaluated.total)]


def step(**changes: Any) -> tuple[list[float], Squares]:
    """numbers(), and what was made on the way."""
    with Squares() as seen:
        found = numbers(**changes)
    return found, seen


@pytest.mark.parametrize("changes", RECOMPUTED.values(), ids=RECOMPUTED.keys())
def test_a_kernel_that_takes_segments_meets_no_square(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, _ = step(**changes)
    row = Implementation(
        "by-segment", by_segment, lambda need: None if need.segments else "needs documents"
    )
    monkeypatch.setitem(TABLE, "attention", [row, *TABLE["attention"]])
    monkeypatch.setitem(PREFERENCES, "auto", ["by-segment", *PREFERENCES["auto"]])
    found, seen = step(**changes)
    assert seen.others == seen.masks == 0
    assert found == pytest.approx(dense, rel=1e-5)


ALIKE = {**RECOMPUTED, "zero bubble": {SCHEDULE: "zb-h1"}}
BY_BORDERS = [
    pytest.param(
        name, changes, id=f"{name}, {how}", marks=[pytest.mark.ci] * (name == "torch-flex")
    )
    for name in ("torch-flex", "torch-varlen", "flash-attn")
    for how, changes in ALIKE.items()
]


@pytest.mark.parametrize(("name", "changes"), BY_BORDERS)
def test_a_step_is_the_same_with_every_kernel_that_takes_borders(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four layers, two micro batches: FlexAttention makes one block mask each, twice with evaluation."""
    dense = numbers(**changes)
    ON_A_CPU[name](monkeypatch)
    (row,) = [row for row in TABLE["attention"] if row.name == name]
    here = replace(row, usable=lambda need: None)
    monkeypatch.setitem(TABLE, "attention", [here, *TABLE["attention"]])
    monkeypatch.setitem(PREFERENCES, "auto", [name, "torch-sdpa"])
    masks = []
    made = segments.block_mask
    monkeypatch.setattr(segments, "block_mask", lambda starts: masks.append(1) or made(starts))
    assert numbers(**changes) == pytest.approx(dense, rel=1e-5)
    assert len(masks) == (4 if name == "torch-flex" else 0)


@pytest.mark.parametrize("backend", ["fused", "unfused"])
def test_a_mask_is_made_once_for_the_layers_that_run_together(backend: str) -> None:
    """Four layers, two micro batches: one each in training, one each in evaluation."""
    _, seen = step(precision__attention_backend=backend)
    assert seen.masks == 4
    _, seen = step(precision__attention_backend=backend, **FULL)
    assert seen.masks == 2 * (4 + 4) + 2 * 4  # each layer forward, again, and in evaluation
