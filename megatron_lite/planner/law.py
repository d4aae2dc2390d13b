"""The learning rate and batch that a scaling law gives a model and a budget (arXiv:2401.02954, section 3).

Fitted there on runs of AdamW with C from 1e17 to 2e19 FLOPs and shown to hold at 1e20.  C = M D: M are the
FLOPs of a token without those of the vocabulary (72 L h^2 + 12 L h s where a layer is GPT's), D the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_lite.blueprint.figure.parts import Figure
from megatron_lite.blueprint.flops import layer_forward

SOURCE = "arXiv:2401.02954"
LAW_RANGE = (1e17, 1e20)
"""FLOPs between which the law was fitted and checked; beyond them it is drawn out."""


class Budget(NamedTuple):
    """What to train with so many FLOPs; batch_tokens: of one step."""

    flops: float
    tokens: float
    learning_rate: float
    batch_tokens: float


def flops_of_a_token(figure: Figure, seq_length: int) -> int:
    """The law's M, forward and backward; attention as a full square."""
    return 3 * int(figure.total(lambda layer: layer_forward(layer, seq_length)))


def budget_of(flops_per_token: float, tokens: float) -> Budget:
    """What the law says of a run of so many tokens."""
    return _at(flops_per_token * tokens, tokens)


def compute_optimal(flops_per_token: float) -> Budget:
    """The run for which this is the best size of a model."""
    flops: float = (flops_per_token / 0.1715) ** (1 / 0.5243)
    return _at(flops, 5.8316 * flops**0.4757)


def _at(flops: float, tokens: float) -> Budget:
    return Budget(flops, tokens, 0.3118 * flops**-0.1250, 0.2920 * flops**0.3271)
