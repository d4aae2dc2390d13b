"""The next token from logits: pure functions, each one filter of the distribution.

Order: repetition penalty, temperature, top-k, top-p, min-p, then one draw.  A filter returns new
logits with -inf where a token is out; it never changes what it was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config.errors import all_together
from megatron_lite.kernels.random import uniform


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; ConfigError for a value out of its range.

    temperature 0 takes the likeliest token and draws nothing; top_k 0, top_p 1 and min_p 0 keep all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            problems.append(
                f"--temperature {self.temperature} must be 0 (the likeliest token) or above"
            )
        if self.top_k < 0:
            problems.append(f"--top-k {self.top_k} must be 0 (keep all) or above")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"--top-p {self.top_p} must be above 0 and at most 1 (keep all)")
        if not 0.0 <= self.min_p <= 1.0:
            problems.append(f"--min-p {self.min_p} must be from 0 (keep all) to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            problems.append(
                f"--repetition-penalty {self.repetition_penalty} must be above 0; 1 is none"
            )
        if problems:
            raise all_together(problems, "with sampling")

    def filtered(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """logits: [b, v], all of one text whose tokens so far these are -> fp32 [b, v] of what may be drawn."""
        if self.repetition_penalty != 1.0:
            seen = torch.tensor([tokens], dtype=torch.int64, device=logits.device).expand(
                len(logits), -1
            )
            logits = penalize_repetition(logits, seen, self.repetition_penalty)
        logits = logits.float()
        if self.temperature == 0.0:
            return keep_top_k(logits, 1)
        # the largest is 0: the smallest temperature leaves it so
        coldest = max(self.temperature, torch.finfo(torch.float32).tiny)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / coldest
        if 0 < self.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1.0:
            logits = keep_top_p(logits, self.top_p)
        return keep_min_p(logits, self.min_p) if self.min_p > 0.0 else logits


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws a text's tokens: each is a function of its distribution, the seed, the sample and its place.

    So a text is the same whatever else is in the batch, and on every rank.  ids: those that may be
    drawn are 0 .. ids - 1: rows that no id gives mean nothing.
    """

    settings: Sampling
    ids: int
    seed: int = 0
    sample: int = 0

    def __call__(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """logits: fp32 [1, v], tokens so far -> the next one, int64 [1]."""
        logits = logits[:, : self.ids]
        if self.settings.temperature == 0.0 and self.settings.repetition_penalty == 1.0:
            return logits.argmax(dim=-1)
        place = uniform(self.seed, self.sample, len(tokens))
        places = torch.full((len(logits),), place, device=logits.device)
        return drawn_at(self.settings.filtered(logits, tokens), places)


def drawn_at(logits: Tensor, places: Tensor) -> Tensor:
    """logits: fp32 [b, v], places: in [0, 1) [b] -> int64 [b]: where each place falls among the probabilities.

    The distribution function is in fp64: of a large vocabulary an fp32 sum forgets the last tokens.
    """
    probabilities = logits.softmax(dim=-1).double()
    below = probabilities.cumsum(dim=-1)  # [b, v]
    wanted = places.to(below) * below[:, -1]
    found = torch.searchsorted(below, wanted[:, None], right=True).squeeze(-1)
    # a product that was rounded up to the sum itself falls behind all
    last = probabilities.shape[-1] - 1 - (probabilities > 0).int().flip(-1).argmax(dim=-1)
    return found.minimum(last)


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


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """logits [b, v] -> [b, v] with the tokens left that are at least p times as likely as the likeliest
    (arXiv:2407.01082)."""
    least = logits.amax(dim=-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < least, -torch.inf)
