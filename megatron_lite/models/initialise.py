"""First values of weights, as functions of seed, canonical name and indices."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from megatron_lite.blueprint.figure.parts import Tensor as Spec
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels.random import key, normal
from megatron_lite.parallel.shard import NamedSlice


def initialise(
    weights: Iterable[NamedSlice], *, tensors: Iterable[Spec], model: ModelConfig, seed: int
) -> None:
    """Fill slices of weights, in place, from (seed, canonical name, i, j): equal in every layout.

    N(0, std) for matrices, std / sqrt(2 layers) for the projections into the stream (GPT-2), zero for
    biases, one for norm weights, even within 1 / sqrt(inputs) where that is asked for; adapters as PEFT
    begins them.  tensors: the model's, of which these are slices.
    """
    starts = {tensor.name: tensor.init for tensor in tensors}
    for piece in weights:
        init = starts[piece.name]
        if init == "fan in":
            _even_within_fan_in(piece, seed)
            continue
        if init in ("ones", "zeros"):
            piece.data.fill_(1.0 if init == "ones" else 0.0)
            continue
        drawn = torch.empty_like(piece.data, dtype=torch.float32)
        std = 1.0 if init == "unit normal" else _std(model, into_stream=init == "into stream")
        normal(drawn, key(seed, piece.name), offset=piece.offset, columns=piece.shape[-1], std=std)
        piece.data.copy_(drawn)


def _std(model: ModelConfig, *, into_stream: bool) -> float:
    return model.init_method_std / (math.sqrt(2 * model.num_layers) if into_stream else 1.0)


def _even_within_fan_in(piece: NamedSlice, seed: int) -> None:
    """U(-1, 1) / sqrt(columns): torch's own start of a linear layer."""
    columns = piece.shape[-1]
    drawn = torch.empty_like(piece.data, dtype=torch.float64)
    normal(drawn, key(seed, piece.name), offset=piece.offset, columns=columns, std=1.0)
    # the normal distribution's own integral makes its numbers even
    piece.data.copy_(torch.erf(drawn / math.sqrt(2.0)) / math.sqrt(columns))
