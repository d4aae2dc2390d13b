"""Prefill and decode: continuing token sequences with a decoder that holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.inference.cache import KeyValueCache
from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.models.decoder import Decoder

Pick = Callable[[Tensor, Tensor], Tensor]
"""(logits fp32 [b, v], tokens so far int64 [b, t]) -> next tokens int64 [b]."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Generated ids without the prompt, and whether the end-of-document token ended them."""

    ids: list[int]
    ended: bool


@torch.no_grad()
def generate(
    model: Decoder, prompt: Sequence[int], *, max_new_tokens: int, pick: Pick, eod: int | None
) -> Continuation:
    """Continue one prompt of at least one token, reusing keys and values.

    Stops at eod, after max_new_tokens, or where the position table ends.
    """
    assert prompt, "a prompt has at least one token (the end-of-document token, say)"
    context = model.context
    device = context.ctx.device
    longest = _longest(model, len(prompt) + max_new_tokens)
    cache = KeyValueCache(longest)
    tokens = torch.tensor([list(prompt)[-longest:]], device=device)
    logits = _forward(model, tokens, cache)
    generated: list[int] = []
    while len(generated) < max_new_tokens:
        chosen = pick(logits, tokens)
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        number = int(chosen[0])  # waits for the device
        if number == eod:
            return Continuation(generated, True)
        generated.append(number)
        if cache.length == longest:
            break
        logits = _forward(model, chosen[:, None], cache)
    return Continuation(generated, False)


def _longest(model: Decoder, wanted: int) -> int:
    config = model.context.model
    learned = config.position_embedding_type == "learned_absolute"
    return min(wanted, config.num_positions) if learned else wanted


def _forward(model: Decoder, new: Tensor, cache: KeyValueCache) -> Tensor:
    """new: int64 [b, t] -> logits of the real vocabulary after the last one, fp32 [b, v]."""
    count = new.shape[1]
    at = ForwardContext(
        samples=torch.zeros(new.shape[0], dtype=torch.int64, device=new.device),
        index=cache.positions(count, new.device),
        cache=cache,
    )
    logits = model(new.t(), at)[-1]
    cache.advance(count)
    return logits[:, : model.context.vocab_size].float()
