"""One forward of rows of a batch through every stage of a pipeline, for the logits behind each row.

rows      0 1 | 2 3        as many groups as there are stages, so that all of them have work:
groups     0  |  1         a group is a micro batch with a cache of its own, in which each stage
                           keeps the layers it has
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lite.blueprint.draw_up import forwards
from megatron_lite.blueprint.stages import round_robin
from megatron_lite.inference.cache import KeyValueCache
from megatron_lite.inference.replay import RecordStep, ReplayedDecode
from megatron_lite.layers.outputs import Outputs
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.collectives import all_gather
from megatron_lite.pipeline.executor import Executor
from megatron_lite.pipeline.mail import Mail
from megatron_lite.pipeline.stage import MicroBatch, Scored, Stage


class ForwardPipeline:
    """This rank's stage of a model in a pipeline that only looks.

    score: takes the outputs of each micro batch on the stage with the head.
    """

    def __init__(self, model: Decoder, score: Callable[[Any, MicroBatch], object]) -> None:
        context, pp = model.context, model.context.ctx.pp
        self._context, self._placement = context, round_robin(pp.size)

        def scored(outputs: Any, batch: MicroBatch) -> Scored:
            score(outputs, batch)
            zero = outputs.x.new_zeros(())
            return Scored(zero, zero)

        stage = Stage(
            index=pp.rank, module=model, is_first=model.has_embedding, is_last=model.has_head,
            score=scored, gradients=context.gradients,
        )  # fmt: skip
        self._executor = Executor({pp.rank: stage}, Mail(pp, self._placement), _no_backward)

    def run(self, batches: Sequence[MicroBatch]) -> None:
        """Collective over the ranks of the model; all micro batches have the same shape."""
        context, pp = self._context, self._context.ctx.pp
        shape = (*batches[0].tokens.shape, context.model.hidden_size)
        self._executor.mail.expect(shape, context.dtype, context.ctx.device)
        self._executor.run(forwards(self._placement, len(batches))[pp.rank], batches, None)


class CachedRows:
    """Rows of a batch that continue by some tokens at a time, over tp and pp.

    Collective over the ranks of the model: each makes the same calls.  rows: at once; capacity,
    start: see KeyValueCache.  record: how decode steps are recorded, where one process has the model.
    """

    def __init__(
        self, model: Decoder, rows: int, capacity: int, *, start: int | None = None,
        record: RecordStep | None = None,
    ) -> None:  # fmt: skip
        self.model, self.ctx, self.rows = model, model.context.ctx, rows
        self._group = -(-rows // self.ctx.pp.size)
        self._caches = [
            KeyValueCache(self._group, capacity, start, self.ctx.device)
            for _ in range(-(-rows // self._group))
        ]
        self._replayed = record and ReplayedDecode(model, self._caches[0], record)
        self._forwards = ForwardPipeline(model, self._note)
        self._noted: list[Tensor] = []

    @property
    def gives_logits(self) -> bool:
        """Whether this rank holds the head."""
        return self.model.has_head

    def room(self, row: int) -> int:
        """Tokens that the row can take in one forward."""
        return self._caches[row // self._group].room(row % self._group)

    def length(self, row: int) -> int:
        """Tokens that the row has seen."""
        return self._caches[row // self._group].lengths[row % self._group]

    def whole(self, row: int) -> int:
        """Tokens that its text will have; see KeyValueCache."""
        return self._caches[row // self._group].wholes[row % self._group]

    @property
    def capacity(self) -> int:
        """Tokens of a row."""
        return self._caches[0].capacity

    def grow(self, capacity: int) -> None:
        """Rows of more tokens; see KeyValueCache."""
        for cache in self._caches:
            cache.grow(capacity)

    @property
    def recorded(self) -> int:
        """Graphs of decode steps that were recorded so far."""
        return 0 if self._replayed is None else self._replayed.recorded

    def free(self, row: int, whole: int | None = None, *, behind: int = 0) -> None:
        """Another text comes into this row, which will have so many tokens, the first of which it
        may have already; see KeyValueCache."""
        self._caches[row // self._group].rewind(row % self._group, behind, whole)

    @torch.no_grad()
    def forward(self, new: Sequence[Sequence[int]]) -> Tensor | None:
        """The next tokens of each row, some of them none -> fp32 logits [rows, v] after the last of each.

        None on a stage without the head; of a row without new tokens they mean nothing.  The next
        call may overwrite them.
        """
        if self.ctx.pp.size > 1:  # micro batches of a pipeline have one shape
            groups = range(0, self._group * len(self._caches), self._group)
            noted = self._run(new, [range(first, first + self._group) for first in groups])
            return torch.cat(noted)[: self.rows] if noted else None
        parts = parted(new)
        if len(parts) == 1:
            return self._part(new, range(self.rows))
        found: Tensor | None = None
        for part, rows in parts:
            logits = self._part(part, rows)
            found = logits.new_zeros(self.rows, logits.shape[1]) if found is None else found
            for row, each in zip(rows, logits, strict=True):
                if part[row]:
                    found[row] = each
        return found

    def _part(self, new: Sequence[Sequence[int]], rows: range) -> Tensor:
        """The same of some rows, by a graph where that can be: fp32 [rows here, v]."""
        replayed = None
        if self._replayed is not None and len(rows) == self.rows:
            replayed = self._replayed.forward(new)
        return self._run(new, [rows])[0] if replayed is None else replayed

    def _run(self, new: Sequence[Sequence[int]], parts: Sequence[range]) -> list[Tensor]:
        """One forward, in which each part, rows of one group, is a micro batch."""
        new, device = [*new, *[[]] * (self._group * len(self._caches) - len(new))], self.ctx.device
        most = max(len(new[row]) for part in parts for row in part)
        batches = []
        for part in parts:
            padded = [[*new[row], *[0] * (most - len(new[row]))] for row in part]
            counts = [len(new[row]) for row in part]
            last = torch.tensor([max(n - 1, 0) for n in counts], device=device)
            group, first = divmod(part.start, self._group)
            entry = self._caches[group].enter(counts, most, range(first, first + len(part)))
            # who scores is told which token is asked for in the labels' place
            tokens = torch.tensor(padded, device=device).t()  # [s, rows]
            batches.append(MicroBatch(tokens, last, last, entry.context))
        self._noted = []
        self._forwards.run(batches)
        return self._noted

    def _note(self, outputs: Outputs, batch: MicroBatch) -> None:
        """Outputs of [s, b, h]: only those of each row's last token are multiplied with the head."""
        context = self.model.context
        index = batch.labels[None, :, None].expand(1, -1, outputs.x.shape[-1])
        asked = dataclasses.replace(outputs, x=outputs.x.gather(0, index))
        logits = asked.logits()[0]  # [b, v/tp]
        whole = all_gather(logits.t().contiguous(), context.tp).t()
        self._noted.append(whole[:, : context.vocab_size].float())


def parted(new: Sequence[Sequence[int]]) -> list[tuple[Sequence[Sequence[int]], range]]:
    """New tokens of rows, and the rows, of forwards that waste little on padding.

    All at once where that makes them at most twice as many; else each prompt by itself, and
    together those that bring one token.
    """
    counts, rows = list(map(len, new)), range(len(new))
    if max(counts) * len(counts) <= 2 * sum(counts):
        return [(new, rows)]
    long = [row for row in rows if counts[row] > 1]
    parts: list[tuple[Sequence[Sequence[int]], range]] = [(new, range(n, n + 1)) for n in long]
    if 1 in counts or not long:
        parts.append(([tokens if len(tokens) <= 1 else [] for tokens in new], rows))
    return parts


def _no_backward(stage: int, left: Sequence[Tensor] | None) -> None:
    raise AssertionError(f"stage {stage} has no backward here")
