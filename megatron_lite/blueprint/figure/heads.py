"""HEADS: what stands behind the final norm, by name; an objective says which it scores."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lite.blueprint.figure.parts import HEAD, Table
from megatron_lite.config.sections.model import ModelConfig

VOCABULARY = "vocabulary"


def projection(rows: int) -> Callable[[ModelConfig, int], Table]:
    """A head of so many numbers per token, whole on every tp rank: a value, a reward, a few classes."""

    def draw(model: ModelConfig, padded_vocab_size: int) -> Table:
        return Table(HEAD, rows, model.hidden_size, vocabulary=False, kind="weight")

    return draw


def _vocabulary(model: ModelConfig, padded_vocab_size: int) -> Table | None:
    if not model.untie_embeddings_and_output_weights:
        return None
    return Table(HEAD, padded_vocab_size, model.hidden_size, vocabulary=True, kind="weight")


HEADS: dict[str, Callable[[ModelConfig, int], Table | None]] = {
    VOCABULARY: _vocabulary,
    "scalar": projection(1),
}
"""(model, padded vocabulary) -> the output matrix; None: the token table once more.

A new row needs nothing else: modules, first values, checkpoint names and the planner's counts follow
from the table it makes.
"""
