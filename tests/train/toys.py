"""Objectives of tests, in the tables as a user's would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lite.config.objectives import LM_LOSS, OBJECTIVES, ObjectiveNeeds
from megatron_lite.data.batch import Batch
from megatron_lite.layers.contexts import StageContext
from megatron_lite.parallel.collectives import MAX, all_reduce
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.objectives.base import Metric, Objective
from megatron_lite.train.objectives.language_model import LanguageModel
from megatron_lite.train.objectives.table import LOSSES


@dataclass(frozen=True, slots=True)
class Accuracy(LanguageModel):
    """A language model that also tells how often the likeliest token is the right one."""

    metrics: tuple[Metric, ...] = (Metric("accuracy"), Metric("hits", mean=False))

    def loss(self, outputs: Tensor, batch: MicroBatch) -> Scored:
        """Beside the loss: hits among the tokens that count, once as a share and once as a sum."""
        scored = LanguageModel.loss(self, outputs, batch)
        hits = (self._is_best(outputs, batch.labels) * batch.loss_mask).sum()
        return replace(scored, metrics={"accuracy": hits, "hits": hits})

    @torch.no_grad()
    def _is_best(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[s, b, v/tp] -> [s, b]: 1.0 where no real token is likelier than the label."""
        columns = logits.shape[-1]
        real = min(max(self.vocab_size - self.tp.rank * columns, 0), columns)
        best = (
            logits[..., :real].amax(dim=-1) if real else logits.new_full(labels.shape, -torch.inf)
        )
        local = labels - self.tp.rank * columns
        here = (local >= 0) & (local < columns)
        own = logits.gather(-1, local.clamp(0, columns - 1)[..., None])[..., 0]
        of_label = own.masked_fill(~here, -torch.inf)
        best, of_label = (all_reduce(x.contiguous(), self.tp, MAX) for x in (best, of_label))
        return (of_label >= best).float()


@dataclass(frozen=True, slots=True)
class Value:
    """A number per token from a scalar head, held against one that follows from the label."""

    metrics: tuple[Metric, ...] = (Metric("value"),)

    def weight(self, batch: Batch) -> float:
        """Half of the tokens that count: whatever an objective divides by need not be whole."""
        return 0.5 * float(batch.loss_mask.sum(dtype="float64"))

    def loss(self, outputs: Tensor, batch: MicroBatch) -> Scored:
        """outputs: [s, b, 1] -> squared errors over the tokens that count."""
        values = outputs[..., 0].float()
        errors = (values - batch.labels % 7 / 7.0) ** 2
        return Scored(
            (errors * batch.loss_mask).sum(),
            0.5 * batch.loss_mask.sum(),
            {"value": (values * batch.loss_mask).sum()},
        )


def _value(context: StageContext) -> Value:
    return Value()


def _accuracy(context: StageContext) -> Accuracy:
    return Accuracy(context.tp, context.vocab_size)


ROWS: dict[str, tuple[ObjectiveNeeds, Callable[[StageContext], Objective]]] = {
    "accuracy": (ObjectiveNeeds("pretrain", "vocabulary", LM_LOSS), _accuracy),
    "value": (ObjectiveNeeds(dataset="pretrain", head="scalar"), _value),
}


def register() -> None:
    """Into the tables of this process: one that was started knows them not."""
    for name, (needs, make) in ROWS.items():
        OBJECTIVES[name], LOSSES[name] = needs, make
