"""Log probabilities of given tokens, of any number of rows, over tp, pp and dp.

    rows ─▶ dealt to dp ranks ─▶ micro batches, padded on the right ─▶ forward-only schedule
         ◀─ float64, in order, on every rank ◀─ summed over pp and dp ◀─ last stage

A row's numbers do not depend on what stands beside it: padding comes after it, and attention looks back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_lite.inference.stages import ForwardPipeline
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.cross_entropy import token_losses
from megatron_lite.layers.outputs import Outputs
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.collectives import MAX, MIN, all_reduce
from megatron_lite.pipeline.stage import MicroBatch

Ids = npt.NDArray[np.int64]

_LOGITS_BYTES = 1 << 28
"""Of the logits that exist at a time, in fp32."""


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """tokens: what the model sees; targets[i] is to come after tokens[positions[i]]."""

    tokens: Ids
    positions: Ids
    targets: Ids


@dataclass(frozen=True, slots=True)
class RowScores:
    """Of each target: its log probability, float64, and whether no token is likelier."""

    log_probabilities: npt.NDArray[np.float64]
    likeliest: npt.NDArray[np.bool_]


@dataclass(slots=True)
class Scorer:
    """Scores rows with this rank's part of a model; all ranks call it with the same rows.

    batch_size: rows of a micro batch.
    """

    model: Decoder
    batch_size: int = 8
    _forwards: ForwardPipeline = field(init=False)
    _found: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._forwards = ForwardPipeline(self.model, self._score)

    @property
    def context(self) -> StageContext:
        """Of the model."""
        return self.model.context

    @property
    def round_size(self) -> int:
        """Rows that are scored at a time: on every dp rank as many micro batches as keep its stages busy."""
        ctx = self.context.ctx
        return ctx.dp.size * self.batch_size * (4 * ctx.pp.size if ctx.pp.size > 1 else 1)

    def stream(self, rows: Iterable[ScoredRow]) -> Iterator[RowScores]:
        """The scores of each row, in their order; holds one round of them."""
        rest = iter(rows)
        while held := list(islice(rest, self.round_size)):
            yield from self._round(held)

    def all(
        self, rows: Sequence[ScoredRow], told: Callable[[int], object] = lambda done: None
    ) -> list[RowScores]:
        """The same of rows that are all there, the longest first: little is padded, and what does not
        fit into memory shows at once.  told: the number of rows of each finished round."""
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n].tokens))
        found: dict[int, RowScores] = {}
        for start in range(0, len(order), self.round_size):
            held = order[start : start + self.round_size]
            found.update(zip(held, self._round([rows[n] for n in held]), strict=True))
            told(len(held))
        return [found[n] for n in range(len(rows))]

    def _round(self, rows: Sequence[ScoredRow]) -> list[RowScores]:
        ctx = self.context.ctx
        mine = range(ctx.dp.rank, len(rows), ctx.dp.size)
        ends = np.cumsum([len(row.targets) for row in rows])
        places = [np.arange(ends[n] - len(rows[n].targets), ends[n]) for n in mine]
        found = torch.zeros(2, int(ends[-1]), dtype=torch.float64, device=ctx.device)
        if mine:
            scores = self._forward([rows[n] for n in mine])
            if scores is not None:
                found[:, torch.from_numpy(np.concatenate(places)).to(ctx.device)] = scores
        found = all_reduce(all_reduce(found, ctx.pp), ctx.dp)
        log_probabilities, likeliest = found.cpu().numpy()  # waits for the device
        return [
            RowScores(log_probabilities[end - len(row.targets) : end],
                      likeliest[end - len(row.targets) : end] > 0)
            for row, end in zip(rows, ends, strict=True)
        ]  # fmt: skip

    def _forward(self, rows: Sequence[ScoredRow]) -> Tensor | None:
        """float64 [2, targets] of these rows on the last stage, None on others."""
        width = min(self.batch_size, len(rows))  # of each micro batch: messages have one shape
        length = max(len(row.tokens) for row in rows)
        parts = [rows[start : start + width] for start in range(0, len(rows), width)]
        batches = [self._microbatch(part, width, length) for part in parts]
        self._found.clear()
        self._forwards.run(batches)
        return torch.cat(self._found, dim=1) if self._found else None

    def _microbatch(self, rows: Sequence[ScoredRow], width: int, length: int) -> MicroBatch:
        tokens = np.zeros((length, width), np.int64)
        for place, row in enumerate(rows):
            tokens[: len(row.tokens), place] = row.tokens
        counts = [len(row.targets) for row in rows]
        asked = {
            "positions": np.concatenate([row.positions for row in rows]),
            "rows": np.repeat(np.arange(len(rows)), counts),
            "targets": np.concatenate([row.targets for row in rows]),
        }
        device = self.context.ctx.device
        at = ForwardContext(
            samples=torch.zeros(width, dtype=torch.int64, device=device),
            index=torch.arange(length, device=device),
            # of each row its own: how far another one is longer must not change its numbers
            length=tuple([len(row.tokens) for row in rows] + [1] * (width - len(rows))),
        )
        on_device = torch.from_numpy(tokens).to(device)
        extras = {name: torch.from_numpy(array).to(device) for name, array in asked.items()}
        return MicroBatch(on_device, on_device, on_device, at, extras)

    def _score(self, outputs: Outputs, batch: MicroBatch) -> None:
        self._found.append(scores_at(outputs, batch.extras))


def scores_at(outputs: Outputs, asked: Mapping[str, Tensor]) -> Tensor:
    """float64 [2, targets]: log p of a target, and 1 where no token is likelier; equal on all tp ranks.

    asked: int64 [targets] each: positions and rows of the outputs, and the targets.  Only these rows
    are multiplied with the head's matrix, so many at a time that their logits are small.
    """
    positions, rows, targets = asked["positions"], asked["rows"], asked["targets"]
    size = max(1, _LOGITS_BYTES // (4 * outputs.weight.shape[0]))
    found = outputs.x.new_zeros((2, len(targets)), dtype=torch.float64)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        chosen = replace(outputs, x=outputs.x[positions[part], rows[part]][:, None])
        logits = chosen.logits()  # [part, 1, v/tp]
        found[1, part] = (_likeliest(logits[:, 0], outputs.context) == targets[part]).double()
        found[0, part] = -token_losses(logits, targets[part, None], outputs.scoring)[:, 0].double()
    return found


def _likeliest(logits: Tensor, context: StageContext) -> Tensor:
    """logits: [k, v/tp] -> int64 [k]: the first of the largest in the whole vocabulary."""
    tp, width = context.tp, logits.shape[1]
    real = min(width, max(context.vocab_size - tp.rank * width, 0))  # the rest is padding
    if real:
        largest, place = logits[:, :real].max(dim=-1)
        largest = largest.float()
    else:
        largest = logits.new_full((len(logits),), -torch.inf, dtype=torch.float32)
        place = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    top = all_reduce(largest.clone(), tp, MAX)
    nowhere = torch.full_like(place, context.vocab_size)
    return all_reduce(torch.where(largest == top, place + tp.rank * width, nowhere), tp, MIN)
