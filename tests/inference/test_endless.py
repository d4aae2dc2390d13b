"""Text without end by the first and the latest tokens: memory stays, and it predicts (arXiv:2309.17453)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lite.data.batch import Batch
from megatron_lite.inference.generate import Generation, TextRequest
from megatron_lite.inference.stages import CachedRows
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.decoding import likeliest, whole_forward
from tests.support.memory import Alive
from tests.support.places import ROOT
from tests.support.tiny import draw, tiny_config

WINDOW, START = 32, 4


def llama(**changes: Any) -> Any:
    """A run of a model with rotary positions, whose tokens are bytes."""
    config = tiny_config(
        model__num_layers=2, model__hidden_size=64, model__num_attention_heads=4, model__vocab_size=256,
        model__seq_length=WINDOW, model__max_position_embeddings=WINDOW,
        model__position_embedding_type="rope", model__hidden_dropout=0.0, model__attention_dropout=0.0,
        **changes,
    )  # fmt: skip
    return assemble(config, draw(config, 1), ParallelContext.serial())


def model_of(run: Any) -> Decoder:
    (stage,) = run.pipeline.stages.values()
    model = stage.module.eval()
    assert isinstance(model, Decoder)
    return model


@pytest.mark.ci
def test_memory_stays_over_eight_windows() -> None:
    model = model_of(llama())
    held = []
    with Alive() as alive:
        asked = TextRequest(list(b"It was a dark"), 8 * WINDOW, likeliest)
        for _ in Generation(model, keep=WINDOW, start=START, chunk=5).run([asked]):
            held.append((alive.now, alive.peak))
    assert len(held) == 8 * WINDOW
    # the ring turns after a window; from then on nothing is added
    assert held[-1] == held[2 * WINDOW]
    assert max(now for now, _ in held[2 * WINDOW :]) == min(now for now, _ in held[2 * WINDOW :])


def trained(steps: int) -> Decoder:
    """On the text of our own guides."""
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").rglob("*.md")))
    data = np.frombuffer(text, np.uint8).astype(np.int64)
    run = llama(train__micro_batch_size=16, train__global_batch_size=16)
    draws = np.random.default_rng(0)
    for _ in range(steps):
        begins = draws.integers(0, len(data) - WINDOW - 1, 16)
        rows = np.stack([data[n : n + WINDOW + 1] for n in begins])
        batch = Batch(rows, np.arange(16), np.ones((16, WINDOW), np.float32))
        train_step(run, [batch], lr=3e-3, weight_decay=0.0)
    return model_of(run)


@pytest.mark.slow
def test_what_is_kept_predicts_as_well_as_a_window() -> None:
    """Over eight windows, after one: the dense one makes all keys anew for each token."""
    model = trained(600)
    text = list((ROOT / "README.md").read_bytes()[2000 : 2000 + 8 * WINDOW])
    rows = CachedRows(model, 1, WINDOW, start=START)
    rows.free(0)
    kept, dense = [], []
    for place, following in enumerate(text[1:], start=1):
        logits = rows.forward([[text[place - 1]]])
        assert logits is not None
        if place > WINDOW:
            latest = text[place - WINDOW : place]
            both = torch.stack((logits[0], whole_forward(model, latest, WINDOW)))
            losses = -both.log_softmax(-1)[:, following]
            kept.append(float(losses[0]))
            dense.append(float(losses[1]))
    perplexity, windows = (math.exp(sum(losses) / len(losses)) for losses in (kept, dense))
    print(f"perplexity by what is kept {perplexity:.2f}, by a dense window {windows:.2f}")
    assert windows < 40  # it has learned: 256 tokens there are
    assert perplexity <= 1.3 * windows
