"""Neighbouring rotary pairs (--rotary-interleaved) become halves of a head, which Hugging Face's families turn.

    channels that turn together    (0 1) (2 3) (4 5)  ─▶  (0 3) (1 4) (2 5)
    so the rows of q and k go      0 2 4 1 3 5, channels that do not turn stay where they are

The same pairs turn by the same angles, and a query's product with a key is the same sum in another order.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_lite.blueprint.figure.parts import Core
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.config.sections.model import ModelConfig

_TURNED = tuple(f".attention.{module}" for module in ("q", "k", "q_norm", "k_norm"))


def core_of(model: ModelConfig) -> Core:
    """The attention that all layers have."""
    return figure_of(model, 1).layers[0].of(Core)[0]


def with_halves(model: ModelConfig) -> ModelConfig:
    """The model that by_halves() makes the weights of."""
    return replace(model, rotary_interleaved=False) if core_of(model).interleaved else model


def by_halves(name: str, tensor: Tensor, core: Core) -> None:
    """Put the rows of a canonical tensor into the order of a model whose halves turn, in place."""
    if core.interleaved and name.rpartition(".")[0].endswith(_TURNED):
        heads = tensor.unflatten(0, (-1, core.head_size))[:, : core.rotated]
        heads.copy_(heads.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2).clone())
