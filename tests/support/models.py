"""A stage without an engine, filled as a run fills its weights."""

from __future__ import annotations

from megatron_lite.models.decoder import Decoder
from megatron_lite.models.initialise import initialise
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.shard import weight_slices


def fill(model: Decoder) -> None:
    """First values of every parameter, from the seed of the model's context."""
    held, context = local_parameters(model), model.context
    initialise(
        weight_slices(held, context.ctx, owned=False),
        tensors=[piece.spec for local in held for piece in local.pieces],
        model=context.model,
        seed=context.seed,
    )
