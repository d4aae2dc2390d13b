"""The engine: fp16 overflow is skipped by all ranks alike; updates equal torch's AdamW."""

import pytest
import torch

from megatron_lite.engines.base import Update
from megatron_lite.engines.loss_scale import LossScale
from megatron_lite.optim import groups
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import PP, TP, ZERO
from tests.support.engines import OF_EVERY_LAYOUT
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

FP16 = {"precision__fp16": True, "precision__loss_scale_window": 3, "model__num_layers": 2}


def fp16_steps(rank, ranks, engine, changes, overflow_at):
    config = tiny_config(**changes, parallel__engine=engine)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    seen = []
    for step in range(6):
        if step == overflow_at and rank == ranks - 1:
            # one rank alone overflows: everybody must skip
            next(iter(run.engine.gradients(owned=False))).data.view(-1)[0] = float("inf")
        before = next(iter(run.engine.weights(owned=False))).data.clone()
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step)
        result = train_step(run, batches, lr=1e-3, weight_decay=0.0)
        changed = not torch.equal(before, next(iter(run.engine.weights(owned=False))).data)
        seen.append((result.update.skipped, run.engine.loss_scale, changed))
    return seen


@pytest.mark.parametrize("engine", OF_EVERY_LAYOUT)
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, {}), (2, {TP: 2}), (2, {PP: 2}), (2, {}), (2, {ZERO: 1}), (4, {TP: 2, PP: 2})],
)
def test_an_overflow_on_one_rank_is_skipped_by_all(engine, ranks, layout) -> None:
    changes = FP16 | layout | {"precision__initial_loss_scale": 1024.0, "precision__hysteresis": 1}
    results = spawn(fp16_steps, ranks, engine, changes, 2)
    assert all(row == results[0] for row in results)
    skipped = [step[0] for step in results[0]]
    assert skipped == [False, False, True, False, False, False]
    assert [step[1] for step in results[0]] == [1024, 1024, 512, 512, 512, 1024]
    assert [step[2] for step in results[0]] == [not s for s in skipped]


@pytest.mark.parametrize("engine", OF_EVERY_LAYOUT)
def test_the_scale_falls_from_a_start_that_is_too_high(engine) -> None:
    changes = FP16 | {"precision__initial_loss_scale": 2.0**32, "train__global_batch_size": 2}
    rows = spawn(fp16_steps, 1, engine, changes, -1)[0]
    assert rows[0][0] and rows[0][1] == 2.0**32  # hysteresis 2: the first overflow is tolerated
    assert rows[1][1] == 2.0**31


def test_megatrons_hysteresis_needs_eighteen_skips_from_2_to_the_32_to_2_to_the_15() -> None:
    scaler = LossScale(2.0**32, True, 1.0, 1000, 2, 2)
    skips = 0
    while scaler.scale > 2.0**15:
        scaler.update(overflow=True)
        skips += 1
    assert skips == 18


def test_updates_equal_torch_adamw_with_clipping() -> None:
    config = tiny_config(train__global_batch_size=4)
    blueprint = draw(config, 1)
    ours = assemble(config, blueprint, context(blueprint, 0))
    theirs = assemble(config, blueprint, context(blueprint, 0))
    own = [local.parameter for local in theirs.parameters]
    groups = [
        {"params": [p for p in own if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in own if p.dim() <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    for step in range(4):
        batches = make_batches(config, blueprint, 0, step)
        train_step(ours, batches, lr=1e-2, weight_decay=0.1)

        def gradients_only(norm, *, lr, weight_decay, decoupled_lr, run=theirs):
            for parameter, gradient in run.engine.accumulators():
                parameter.grad = gradient.clone()
                gradient.zero_()
            norm = torch.nn.utils.clip_grad_norm_(own, 1.0)
            adamw.step()
            adamw.zero_grad()
            return Update(norm, skipped=False)

        theirs.engine.apply = gradients_only
        train_step(theirs, batches, lr=1e-2, weight_decay=0.1)
    for a, b in zip(ours.parameters, theirs.parameters, strict=True):
        for piece in a.pieces:
            # a key bias moves no softmax: its gradient is rounding, which Adam makes a full step of
            if not piece.name.endswith("attention.k.bias"):
                torch.testing.assert_close(
                    piece.of(a.parameter), piece.of(b.parameter), rtol=1e-4, atol=1e-6
                )


def test_a_non_finite_gradient_stops_with_the_parameters_name() -> None:
    config = tiny_config()
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    run.engine.accumulators()[3][1].view(-1)[0] = float("nan")
    result = train_step(run, make_batches(config, blueprint, 0, 0), lr=1e-2, weight_decay=0.0)
    assert "blocks.0.attention" in result.stop and result.update.skipped


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "muon"])
def test_an_update_like_the_last_one_asks_nothing_of_the_table(optimizer, monkeypatch) -> None:
    config = tiny_config(optim__optimizer=optimizer, model__num_layers=2)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    for step in range(3):
        train_step(run, make_batches(config, blueprint, 0, step), lr=1e-3, weight_decay=0.0)
        monkeypatch.setattr(groups, "treatment", pytest.fail)
