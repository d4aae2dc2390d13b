"""How a job's next token is chosen, and what is told about the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.inference.sampling import Sampler, Sampling
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.context import ParallelContext


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a request's answers: equal seeds give equal ones.

    top: alternatives that are told of each token; None: nothing is told.
    """

    sampling: Sampling
    seed: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    top: int | None = None


@dataclass(frozen=True, slots=True)
class Chance:
    """The logarithm of a token's probability before any setting changed it, and the likeliest others'."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Picker:
    """A `Pick` for one answer; the chance of its latest choice lies in `chance`."""

    def __init__(self, settings: Settings, number: int, *, prompt: int, ids: int) -> None:
        """number: of the answer among those of its request; prompt: its tokens; ids: see Sampler."""
        self.settings, self.number = settings, number
        self._prompt, self._ids = prompt, ids
        self._sampler = Sampler(settings.sampling, ids, settings.seed, number)
        self.chance: Chance | None = None

    def __call__(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """See Pick."""
        logits = logits[:, : self._ids]
        chosen = self._sampler(self._weighed(logits, tokens[self._prompt :]), tokens)
        top = self.settings.top
        self.chance = None if top is None else _chance(logits, chosen, top)
        return chosen

    def _weighed(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        """Less of what the answer has said, and the biases: OpenAI's formula."""
        settings = self.settings
        if settings.presence_penalty or settings.frequency_penalty:
            said = torch.tensor([answer], dtype=torch.int64, device=logits.device)
            counts = torch.zeros_like(logits).scatter_add_(
                1, said, torch.ones_like(said, dtype=logits.dtype)
            )
            logits = logits - settings.frequency_penalty * counts
            logits = logits - settings.presence_penalty * (counts > 0)
        if settings.bias:
            ids = torch.tensor([list(settings.bias)], device=logits.device)
            values = torch.tensor([list(settings.bias.values())], device=logits.device)
            logits = logits.scatter_add(1, ids, values.to(logits.dtype))
        return logits


def _chance(logits: Tensor, chosen: Tensor, top: int) -> Chance:
    logprobs = logits.float().log_softmax(-1)[0]
    best = logprobs.topk(min(top, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)  # waits for the device
    return Chance(float(logprobs[chosen[0]]), tuple(pairs))


def share_chances(pickers: Sequence[Picker], ctx: ParallelContext) -> None:
    """What the last stage has found out of each latest choice, on every stage of the pipeline.

    Every rank brings the pickers of the same choices; nothing is sent where none of them tells.
    """
    telling = [picker for picker in pickers if picker.settings.top is not None]
    if ctx.pp.size == 1 or not telling:
        return
    width = max(picker.settings.top or 0 for picker in telling)
    # fp64 holds fp32 and every id exactly; a row: logprob, how many others, their ids, their logprobs
    told = torch.zeros(len(telling), 2 + 2 * width, dtype=torch.float64)
    if ctx.pp.rank == ctx.pp.size - 1:
        for row, picker in zip(told, telling, strict=True):
            row.copy_(_row(picker.chance, width))
    told = all_reduce(told.to(ctx.device), ctx.pp).cpu()  # waits for the device
    for row, picker in zip(told.tolist(), telling, strict=True):
        count = int(row[1])
        others = zip(map(int, row[2 : 2 + count]), row[2 + width : 2 + width + count], strict=True)
        picker.chance = Chance(row[0], tuple(others))


def _row(chance: Chance | None, width: int) -> Tensor:
    """fp64 [2 + 2 width], as share_chances sends it."""
    assert chance is not None
    ids, logprobs = [[float(one[part]) for one in chance.top] for part in (0, 1)]
    padding = [0.0] * (width - len(ids))
    numbers = [chance.logprob, float(len(ids)), *ids, *padding, *logprobs, *padding]
    return torch.tensor(numbers, dtype=torch.float64)
