"""How far positions reach, and what is said of a text that goes further."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_lite.config.context_length import beyond_trained, length_lines, trained_length
from megatron_lite.config.sections.model import ModelConfig

ROPE = ModelConfig(
    num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=64,
    position_embedding_type="rope",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reach"),
    [
        ({}, 64),
        ({"max_position_embeddings": 100}, 100),
        ({"position_embedding_type": "learned_absolute"}, None),
        ({"position_embedding_type": "none"}, None),
        ({"window_size": "15,0"}, None),
        ({"window_size": "99,0"}, 64),
        (
            {"rope_scaling_type": "yarn", "rope_original_length": 64, "rope_scaling_factor": 4.0},
            256,
        ),
        (
            {"rope_scaling_type": "llama3", "rope_original_length": 8, "rope_scaling_factor": 4.0},
            64,
        ),
        ({"rope_scaling_type": "longrope", "rope_original_length": 32}, 256),
        ({"rope_scaling_type": "dynamic", "rope_original_length": 32}, None),
        ({"rope_scaling_type": "linear"}, None),
    ],
)
def test_how_far_positions_reach(changes: dict[str, Any], reach: int | None) -> None:
    model = replace(ROPE, **changes)
    assert trained_length(model) == reach
    assert beyond_trained(model, reach or 10**6) is None
    assert reach is None or f"{reach + 1} tokens are 1 more than the {reach}" in str(
        beyond_trained(model, reach + 1)
    )


def test_before_a_text_is_continued_its_length_is_said_where_it_counts() -> None:
    assert list(length_lines(ROPE, 64)) == []
    (warning,) = length_lines(ROPE, 65)
    assert warning.startswith("WARNING: 65 tokens") and "--rope-scaling-factor 2 " in warning
    dynamic = replace(ROPE, rope_scaling_type="dynamic", rope_original_length=64)
    for length, how in ((64, "as in texts up to 64"), (65, "scaled as beyond 64")):
        (line,) = length_lines(dynamic, length)
        assert f"positions are {how} tokens, for a text of {length} with its prompt" in line
