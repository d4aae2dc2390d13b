"""A stage without an engine, filled as a run fills its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.layers.outputs import Outputs
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


def logits_and_loss(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of all but the last of the tokens [b, s + 1], which answer for the next: [s, b, v], mean."""
    at = ForwardContext(
        samples=torch.arange(tokens.shape[0]), index=torch.arange(tokens.shape[1] - 1)
    )
    seen = []

    def score(outputs: Outputs) -> Tensor:
        seen.append(outputs.logits())
        return outputs.token_losses(tokens[:, 1:].t()).mean()

    loss = model(tokens[:, :-1].t(), at, score)
    return seen[0], loss
