"""The next token from logits: pure functions, each one filter of the distribution.

Order: repetition penalty, temperature, top-k, top-p, then one draw.  A filter returns new logits
with -inf where a token is out; it never changes what it was given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lite.config.errors import all_together


def sample(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits: [b, v], tokens so far: int64 [b, t] -> next tokens, int64 [b].

    temperature 0 takes the likeliest token and draws nothing; top_k 0 and top_p 1 keep all.
    Raises ConfigError for a value out of its range.  The same generator state gives the same draw.
    """
    check_settings(temperature, top_k, top_p, repetition_penalty)
    if repetition_penalty != 1.0:
        logits = penalize_repetition(logits, tokens, repetition_penalty)
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = keep_top_k(logits, top_k)
    if top_p < 1.0:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def check_settings(temperature: float, top_k: int, top_p: float, repetition_penalty: float) -> None:
    """ConfigError with every value that is out of range."""
    problems = []
    if not (math.isfinite(temperature) and temperature >= 0.0):
        problems.append(f"--temperature {temperature} must be 0 (the likeliest token) or above")
    if top_k < 0:
        problems.append(f"--top-k {top_k} must be 0 (keep all) or above")
    if not 0.0 < top_p <= 1.0:
        problems.append(f"--top-p {top_p} must be above 0 and at most 1 (keep all)")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0.0):
        problems.append(f"--repetition-penalty {repetition_penalty} must be above 0; 1 is none")
    if problems:
        raise all_together(problems, "with sampling")


def penalize_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """logits [b, v] -> [b, v]: those of tokens already there divided by the penalty, or multiplied
    by it where they are negative, once however often a token came (arXiv:1909.05858 § 4.1)."""
    seen = logits.gather(-1, tokens)  # [b, t]
    return logits.scatter(-1, tokens, torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits [b, v] -> [b, v] with exactly the k largest left; ties are cut by position."""
    values, indices = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """logits [b, v] -> [b, v] with the fewest likeliest tokens left that hold at least p.

    At least one stays (nucleus sampling, arXiv:1904.09751).
    """
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    out = before >= p
    out[..., 0] = False
    return logits.scatter(-1, indices, ordered.masked_fill(out, -torch.inf))
