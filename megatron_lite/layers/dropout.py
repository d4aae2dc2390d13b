"""Dropout as a pure function of seed, step, layer, site, sample, token and feature.

The keys of all layers and sites of a step are made on the host at once and copied to the device,
where a layer takes its own: no number of the step is a constant in a compiled graph.
"""

from __future__ import annotations

import torch

from megatron_lite.blueprint.figure.parts import Matrix
from megatron_lite.kernels.dropout import DropoutCall
from megatron_lite.kernels.random import feature_bits, key
from megatron_lite.layers.contexts import ForwardContext, StageContext, StepDropout
from megatron_lite.parallel.collectives import local_slice

EMBEDDING_LAYER = -1
"""The layer number of the embedding's dropout, whose one site is "embedding"."""

SITES = ("attention", "attention.output", "mlp.output")
"""Where a block drops."""

ADAPTERS = tuple(
    f"{matrix}.adapter" for matrix in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
)
"""Where its adapters drop what they are given (--lora-dropout)."""


def _places(num_layers: int, *, adapters: bool) -> list[tuple[int, str]]:
    blocks = [(layer, site) for layer in range(num_layers) for site in SITES]
    beside = [(layer, site) for layer in range(num_layers if adapters else 0) for site in ADAPTERS]
    return [(EMBEDDING_LAYER, "embedding"), *blocks, *beside]


def key_index(layer: int, site: str, num_layers: int = 0) -> int:
    """Where the key of a layer's site stands in StepDropout.keys; num_layers: all layers, for an adapter."""
    if layer == EMBEDDING_LAYER:
        return 0
    if site in SITES:
        return 1 + layer * len(SITES) + SITES.index(site)
    return 1 + num_layers * len(SITES) + layer * len(ADAPTERS) + ADAPTERS.index(site)


def step_dropout(context: StageContext, step: int) -> StepDropout | None:
    """The dropout of a training step for all its micro batches; None at rate 0.

    On a GPU the copies do not wait for the device.
    """
    model, device = context.model, context.ctx.device
    adapters = _adapters_drop(context)
    if model.hidden_dropout == 0.0 and model.attention_dropout == 0.0 and not adapters:
        return None
    places = _places(model.num_layers, adapters=adapters)
    keys = torch.tensor([key(context.seed, step, layer, site) for layer, site in places])
    if device.type == "cuda":
        keys = keys.pin_memory()
    features = feature_bits(torch.arange(model.hidden_size, device=device))
    return StepDropout(step, keys.to(device, non_blocking=True), features)


def _adapters_drop(context: StageContext) -> bool:
    matrices = (matrix for layer in context.figure.layers[:1] for matrix in layer.of(Matrix))
    return any(matrix.adapter is not None and matrix.adapter.dropout for matrix in matrices)


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
