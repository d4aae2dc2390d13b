"""Dropout as a pure function of seed, step, layer, site, sample, token and feature.

The keys of all layers and sites of a step are made on the host at once and copied to the device,
where a layer takes its own: no number of the step is a constant in a compiled graph.
"""

from __future__ import annotations

import torch

from megatron_lite.kernels.dropout import DropoutCall
from megatron_lite.kernels.random import feature_bits, key
from megatron_lite.layers.contexts import ForwardContext, StageContext, StepDropout
from megatron_lite.parallel.collectives import local_slice

EMBEDDING_LAYER = -1
"""The layer number of the embedding's dropout, whose one site is "embedding"."""

SITES = ("attention", "attention.output", "mlp.output")
"""Where a block drops."""


def _places(num_layers: int) -> list[tuple[int, str]]:
    blocks = [(layer, site) for layer in range(num_layers) for site in SITES]
    return [(EMBEDDING_LAYER, "embedding"), *blocks]


def key_index(layer: int, site: str) -> int:
    """Where the key of a layer's site stands in StepDropout.keys."""
    return 0 if layer == EMBEDDING_LAYER else 1 + layer * len(SITES) + SITES.index(site)


def step_dropout(context: StageContext, step: int) -> StepDropout | None:
    """The dropout of a training step for all its micro batches; None at rate 0.

    On a GPU the copies do not wait for the device.
    """
    model, device = context.model, context.ctx.device
    if model.hidden_dropout == 0.0 and model.attention_dropout == 0.0:
        return None
    places = _places(model.num_layers)
    keys = torch.tensor([key(context.seed, step, layer, site) for layer, site in places])
    if device.type == "cuda":
        keys = keys.pin_memory()
    features = feature_bits(torch.arange(model.hidden_size, device=device))
    return StepDropout(step, keys.to(device, non_blocking=True), features)


class HiddenDropout:
    """The dropout of hidden values at one site of a layer: what a kernel is told of it."""

    def __init__(self, context: StageContext, layer: int, site: str) -> None:
        self.context, self.place = context, key_index(layer, site)
        self.rate = context.model.hidden_dropout

    def call(self, at: ForwardContext) -> DropoutCall | None:
        """For values [s/tp, b, h] with sequence parallelism, else [s, b, h]; None where nothing is dropped.

        Equal in every layout: the mask depends on global coordinates only.
        """
        if at.dropout is None or self.rate == 0.0:
            return None
        index = (
            local_slice(at.index, self.context.tp) if self.context.sequence_parallel else at.index
        )
        keys, features = at.dropout.keys, at.dropout.features
        return DropoutCall(self.rate, keys[self.place], at.samples, index, features)
