"""Greedy decoding as tests do it: the likeliest token, and a forward of the whole text for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.models.decoder import Decoder


def likeliest(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Of those that are not among the latest eight: a tiny model would say one again and again."""
    latest = torch.tensor([tokens[-8:]], device=logits.device)
    return logits.scatter(-1, latest, -torch.inf).argmax(-1)


def whole_forward(model: Decoder, text: Sequence[int], whole: int) -> torch.Tensor:
    """fp32 logits after the last token, [v], without a cache; whole: tokens that the text will have."""
    index = torch.arange(len(text))
    at = ForwardContext(samples=torch.zeros(1, dtype=torch.int64), index=index, length=whole)
    with torch.no_grad():
        return model(torch.tensor(text)[:, None], at)[-1, 0, : model.context.vocab_size].float()
