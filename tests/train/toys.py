"""Objectives of tests, in the tables as a user's would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lite.config.objectives import LM_LOSS, OBJECTIVES, ObjectiveNeeds
from megatron_lite.data.batch import Batch
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.outputs import Outputs
from megatron_lite.parallel.collectives import MAX, all_reduce
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.objectives.base import Metric, Objective
from megatron_lite.train.objectives.language_model import LanguageModel
from megatron_lite.train.objectives.table import LOSSES


@dataclass(frozen=True, slots=True)
class Accuracy(LanguageModel):
    """A language model that also tells how often the likeliest token is the right one."""

    metrics: tuple[Metric, ...] = (Metric("accuracy"), Metric("hits", mean=False))

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        """Beside the loss: hits among the tokens that count, once as a share and once as a sum."""
        scored = LanguageModel.loss(self, outputs, batch)
        hits = (self._is_best(outputs, batch.labels) * batch.loss_mask).sum()
        return replace(scored, metrics={"accuracy": hits, "hits": hits})

    @torch.no_grad()
    def _is_best(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """[s, b]: 1.0 where no real token is likelier than the label."""
        logits, tp = outputs.logits(), outputs.context.tp  # [s, b, v/tp]
        columns = logits.shape[-1]
        real = min(max(outputs.context.vocab_size - tp.rank * columns, 0), columns)
        best = (
            logits[..., :real].amax(dim=-1) if real else logits.new_full(labels.shape, -torch.inf)
        )
        local = labels - tp.rank * columns
        here = (local >= 0) & (local < columns)
        own = logits.gather(-1, local.clamp(0, columns - 1)[..., None])[..., 0]
        of_label = own.masked_fill(~here, -torch.inf)
        best, of_label = (all_reduce(x.contiguous(), tp, MAX) for x in (best, of_label))
        return (of_label >= best).float()


@dataclass(frozen=True, slots=True)
class Value:
    """A number per token from a scalar head, held against one that follows from the label."""

    metrics: tuple[Metric, ...] = (Metric("value"),)

    def weight(self, batch: Batch) -> float:
        """Half of the tokens that count: whatever an objective divides by need not be whole."""
        return 0.5 * float(batch.loss_mask.sum(dtype="float64"))

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        """Squared errors of the head's [s, b, 1] over the tokens that count."""
        values = outputs.logits()[..., 0].float()
        errors = (values - batch.labels % 7 / 7.0) ** 2
        return Scored(
            (errors * batch.loss_mask).sum(),
            0.5 * batch.loss_mask.sum(),
            {"value": (values * batch.loss_mask).sum()},
        )


def _value(context: StageContext) -> Value:
    return Value()


def _accuracy(context: StageContext) -> Accuracy:
    return Accuracy()


ROWS: dict[str, tuple[ObjectiveNeeds, Callable[[StageContext], Objective]]] = {
    "accuracy": (ObjectiveNeeds("pretrain", "vocabulary", LM_LOSS), _accuracy),
    "value": (ObjectiveNeeds(dataset="pretrain", head="scalar"), _value),
}


def register() -> None:
    """Into the tables of this process: one that was started knows them not."""
    for name, (needs, make) in ROWS.items():
        OBJECTIVES[name], LOSSES[name] = needs, make
