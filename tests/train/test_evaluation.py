"""Evaluation: dropout is off, the loss is the mean per token, and training does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import evaluation_step, train_step
from tests.support.axes import PP, TP
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config
from tests.train.runs import alone, steps

LAYOUTS = {
    "serial": (1, {}),
    "tp2": (2, {TP: 2}),
    "pp2": (2, {PP: 2}),
    "dp2": (2, {}),
}


def evaluated(rank, ranks, changes, dropout):
    """Loss sum and token count of a ragged batch, and whether anything was left behind."""
    rates = {"model__hidden_dropout": dropout, "model__attention_dropout": dropout}
    config = tiny_config(**changes, **rates)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    batches = make_batches(config, blueprint, run.ctx.dp.rank, 0, ragged=True)
    sums = evaluation_step(run, batches)
    untouched = not any(gradient.any() for _, gradient in run.engine.accumulators())
    live = sum(stage.num_live for stage in run.pipeline.stages.values())
    return sums.total.item(), sums.count.item(), untouched, live


@pytest.fixture(scope="module")
def without_dropout():
    return spawn(evaluated, 1, {}, 0.0)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_evaluation_ignores_dropout_and_the_layout(without_dropout, name) -> None:
    ranks, changes = LAYOUTS[name]
    total, count, untouched, live = without_dropout
    assert untouched and live == 0
    for found in spawn(evaluated, ranks, changes, 0.5):
        assert found == (pytest.approx(total, rel=1e-6), count, True, 0)


def test_the_sum_over_the_count_is_the_training_loss_where_nothing_is_random() -> None:
    config = tiny_config()
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    batches = make_batches(config, blueprint, 0, 0, ragged=True)
    sums = evaluation_step(run, batches)
    assert sums.count.item() == sum(float(batch.loss_mask.sum()) for batch in batches)
    trained = train_step(run, batches, lr=0.0, weight_decay=0.0).loss
    torch.testing.assert_close(sums.total / sums.count, trained, rtol=1e-6, atol=0.0)


def test_training_is_the_same_with_and_without_evaluations(data: list[str], tmp_path: Path) -> None:
    curves = []
    for name, often in (("never", []), ("often", ["--eval-iters", "2", "--eval-interval", "1"])):
        words = [*data, "--save", str(tmp_path / name), "--save-interval", "99", *often,
                 "--hidden-dropout", "0.2"]  # fmt: skip
        assert alone(*words).rc == 0
        curves.append([(r.loss, r.grad_norm) for r in steps(tmp_path / name)])
    assert curves[0] == curves[1]
