"""A kind of dataset from outside the package: its samples' masks, segments and extras reach every stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.objectives import OBJECTIVES, ObjectiveNeeds
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.batch import Batch
from megatron_lite.data.build import Datasets
from megatron_lite.data.loader import Loader
from megatron_lite.data.samples import Sample
from megatron_lite.data.sources import DATASETS, DatasetKind, kind_for
from megatron_lite.layers.outputs import Outputs
from megatron_lite.pipeline.stage import MicroBatch, Scored, Stage
from megatron_lite.rehearsal.rehearse import rehearse_rank
from megatron_lite.train.assemble import assemble
from megatron_lite.train.objectives.language_model import LanguageModel
from megatron_lite.train.objectives.table import LOSSES
from megatron_lite.train.step import train_step
from tests.support.axes import PP, SP, TP
from tests.support.sizes import SEQ
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, tiny_config
from tests.train.runs import alone, steps

SIZE, WORDS = 24, 60


def sample(number: int, length: int) -> Sample:
    """Two texts in a row, the first of which is not learned; a weight for each token."""
    random = np.random.default_rng(number)
    border = 4 + number % 5
    return Sample(
        random.integers(0, WORDS, length + 1),
        loss_mask=(np.arange(length) >= border - number % 2).astype(np.float32),
        segments=np.array([0, border, length], np.int32),
        extras={
            "weights": random.random(length, np.float32),
            "number": np.array(number, np.int64),
        },
    )


@dataclass
class Weighted:
    """So many samples of a length."""

    length: int
    name: str = "weighted texts"
    said: str = "v1"

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, number: int) -> Sample:
        return sample(number, self.length)

    def content(self) -> str:
        return self.said


def build(
    data: DataConfig, /, *, seq_length: int, valid_samples: int | None, **asked: Any
) -> Datasets:
    return Datasets(Weighted(seq_length), Weighted(seq_length) if valid_samples else None, None,
                    digest=1, asked=(asked["train_samples"], valid_samples, 0))  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightedLoss(LanguageModel):
    """A language model's loss, each token of which counts as much as its weight says."""

    def weight(self, batch: Batch) -> float:
        return float((batch.loss_mask * batch.extras["weights"]).sum(dtype="float64"))

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        counts = batch.loss_mask * batch.extras["weights"].t()
        return Scored(outputs.loss_sum(batch.labels, counts).total, counts.sum())


KIND = DatasetKind(build, lambda length: sample(0, length))
ROWS: list[tuple[Any, Any]] = [
    (DATASETS, KIND),
    (OBJECTIVES, ObjectiveNeeds(dataset="weighted", head="vocabulary")),
    (LOSSES, lambda context: WeightedLoss()),
]


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, row in ROWS:
        monkeypatch.setitem(table, "weighted", row)


Found = tuple[list[float], list[list[int]]]


def trained(rank: int, ranks: int, changes: dict[str, Any], plain: bool) -> Found:
    """Losses and gradient norms of three steps, and the samples whose extras each forward here had.

    plain: the same as a language model, whose loss mask is the product with the weights.
    """
    for table, row in ROWS:
        table["weighted"] = row
    objective = "language-model" if plain else "weighted"
    config = tiny_config(train__objective=objective, optim__optimizer="sgd", **changes)
    run = assemble(config, blueprint := draw(config, ranks), context(blueprint, rank))
    asked = {"train_samples": SIZE, "test_samples": 0, "vocab_size": WORDS, "eod": None}
    made = kind_for("weighted").build(
        config.data, seq_length=SEQ, seed=1, valid_samples=0, cache_folder=None, tokenizer=None,
        **asked,
    )  # fmt: skip
    assert made.train is not None
    loader = Loader(made.train, dp_rank=run.ctx.dp.rank, dp_size=run.ctx.dp.size, num_workers=1)
    numbers: list[list[int]] = []
    real = Stage.forward

    def forward(self: Stage, microbatch: int, batch: MicroBatch, *more: Any) -> Tensor | None:
        numbers.append([int(number) for number in batch.extras["number"]])
        return real(self, microbatch, batch, *more)

    Stage.forward = forward  # type: ignore[method-assign]
    try:
        measured = []
        for step in range(3):
            run.progress.step = step
            batches = loader.next_batches(8 * step, 2, 4 // run.ctx.dp.size)
            if plain:
                batches = [
                    dataclasses.replace(b, loss_mask=b.loss_mask * b.extras["weights"])
                    for b in batches
                ]
            result = train_step(run, batches, lr=0.1, weight_decay=0.0)
            measured += [result.loss.item(), float(result.update.grad_norm)]
    finally:
        Stage.forward = real  # type: ignore[method-assign]
        loader.close()
    return measured, numbers


EVERY = [[2 * micro, 2 * micro + 1] for micro in range(12)]


def test_extras_reach_the_objective() -> None:
    """A weight per token as an extra is, to the bit, that weight in the loss mask."""
    torch.set_num_threads(1)
    measured, numbers = trained(0, 1, {}, False)
    assert numbers == EVERY
    assert measured == trained(0, 1, {}, True)[0]


@pytest.mark.ci
def test_extras_reach_every_stage_and_the_objective_on_four_ranks() -> None:
    torch.set_num_threads(1)
    expected, _ = trained(0, 1, {}, False)
    for measured, numbers in spawn(trained, 4, {TP: 2, PP: 2, SP: True}, False):
        assert measured == pytest.approx(expected, rel=1e-5)
        assert numbers == EVERY


def test_a_run_of_it_is_trained_evaluated_and_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--mock-data", "--objective", "weighted", "--save-interval", "2", "--eval-iters", "1",
             "--eval-interval", "4", "--save"]  # fmt: skip
    once, again = (str(tmp_path / name) for name in ("once", "again"))
    whole = alone(*words, once)
    assert whole.rc == 0, whole.err
    assert "weighted texts" in whole.out and "validation loss at iteration 4" in whole.out
    resumed = alone(*words, again, "--load", once, "--ckpt-step", "2")
    assert resumed.state_hash == whole.state_hash and len(steps(tmp_path / "again")) == 2
    monkeypatch.setattr(Weighted, "content", lambda self: "v2")
    other = alone(*words, str(tmp_path / "other"), "--load", once)
    assert other.rc == DataError.exit_code
    assert "train: weighted texts: its files hold other tokens" in other.err


def test_a_rehearsal_takes_the_kinds_example() -> None:
    config = tiny_config(train__objective="weighted", train__global_batch_size=2)
    rehearsed = rehearse_rank(config, draw(config, 1), 0)
    assert rehearsed.memory is not None, rehearsed.log.failed_at


def test_an_objective_that_names_no_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_for("language-model") is DATASETS["pretrain"]
    monkeypatch.setitem(OBJECTIVES, "lost", ObjectiveNeeds(dataset="nowhere", head="vocabulary"))
    with pytest.raises(
        ConfigError, match="'nowhere', which is no row of DATASETS .it has pretrain"
    ):
        kind_for("lost")
