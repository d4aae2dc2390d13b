"""First values of a stage's parameters, as functions of seed, canonical name and indices."""

from __future__ import annotations

import math

import torch

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.random import key, normal


@torch.no_grad()
def initialise(model: Decoder) -> None:
    """Fill every parameter from (seed, canonical name, i, j): equal in every layout.

    N(0, std) for matrices, std / sqrt(2 layers) for the projections into the stream (GPT-2), zero for
    biases and for the padding rows of the vocabulary, one for norm weights.
    """
    setting = model.setting
    for local in local_parameters(model):
        local.parameter.zero_()
        for piece in local.pieces:
            target = piece.of(local.parameter)
            if local.spec.init == "ones":
                target.fill_(1.0)
            elif local.spec.init != "zeros":
                drawn = torch.empty_like(target, dtype=torch.float32)
                normal(
                    drawn, key(setting.seed, piece.name), offset=piece.offset,
                    std=_std(setting.model, into_stream=local.spec.init == "into stream"),
                    columns=piece.shape[-1],
                )  # fmt: skip
                target.copy_(drawn)


def _std(model: ModelConfig, *, into_stream: bool) -> float:
    return model.init_method_std / (math.sqrt(2 * model.num_layers) if into_stream else 1.0)
