"""A step on packed documents makes no square of the sequence, but where a kernel asks for a mask."""

from __future__ import annotations

from collections.abc import Callable
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
from megatron_lite.kernels import reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.table import PREFERENCES, TABLE, Implementation
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import evaluation_step, train_step
from tests.support.axes import FULL
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
    segments = call.segments
    assert segments is not None and segments.longest < LENGTH
    flat = [x.permute(1, 0, 2, 3).flatten(1, 2) for x in (q, k, v)]  # [n, b s, d]
    borders = segments.cu_seqlens.tolist()
    pieces = [
        reference.attention(*(x[None, :, begin:end] for x in flat), AttentionCall())[0]
        for begin, end in zip(borders, borders[1:], strict=False)
    ]
    return torch.cat(pieces, dim=1).unflatten(1, (segments.rows, LENGTH)).transpose(0, 1)


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


def step(**changes: Any) -> tuple[list[float], Squares]:
    """Loss, gradient norm and loss in evaluation, and what was made on the way."""
    config = tiny_config(model__seq_length=LENGTH, train__global_batch_size=4, **changes)
    run = assemble(config, draw(config, 1), ParallelContext.serial())
    with Squares() as seen:
        trained = train_step(run, batches(), lr=0.0, weight_decay=0.0)
        evaluated = evaluation_step(run, batches())
    norm = float(trained.update.grad_norm)
    return [trained.loss.item(), norm, float(evaluated.total)], seen


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


@pytest.mark.parametrize("backend", ["fused", "unfused"])
def test_a_mask_is_made_once_for_the_layers_that_run_together(backend: str) -> None:
    """Four layers, two micro batches: one each in training, one each in evaluation."""
    _, seen = step(precision__attention_backend=backend)
    assert seen.masks == 4
    _, seen = step(precision__attention_backend=backend, **FULL)
    assert seen.masks == 2 * (4 + 4) + 2 * 4  # each layer forward, again, and in evaluation
