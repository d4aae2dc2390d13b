"""Configurations the blueprint tests share."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.run import RunConfig
from tests.support.axes import PP, TP

GPT3_175B = ModelConfig(
    num_layers=96, hidden_size=12288, num_attention_heads=96, seq_length=2048, vocab_size=50257
)


def config(model: ModelConfig = GPT3_175B, **changes: Any) -> RunConfig:
    """A RunConfig of this model; changes as section__field=value."""
    run = RunConfig(model=model)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        held = dataclasses.replace(getattr(run, section), **{field: value})
        run = dataclasses.replace(run, **{section: held})
    return run


def users_run(**changes: Any) -> RunConfig:
    """The 175B run on 64 GPUs: tp 8 x pp 8, micro batch 1, global batch 1536."""
    wanted = {
        TP: 8,
        PP: 8,
        "train__global_batch_size": 1536,
        "train__train_iters": 500000,
    }
    return config(**{**wanted, **changes})
