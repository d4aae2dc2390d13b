"""An engine that keeps weights apart trains bit for bit as one that keeps them whole."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Store
from megatron_lite.engines.table import ENGINES
from megatron_lite.layers.dropout import step_dropout
from megatron_lite.train.assemble import assemble
from megatron_lite.train.feed import to_device
from megatron_lite.train.health.state_hash import state_hash
from megatron_lite.train.resume import fill_run
from megatron_lite.train.step import evaluation_step, train_step
from tests.engines.apart import Apart, Poisoned, calls_of
from tests.parity.kinds import SELECTIVE, recompute
from tests.support.axes import BF16, PP, SCHEDULE, SP, TP, UNTIED, ZERO
from tests.support.engines import exact_weights, named
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    monkeypatch.setitem(ENGINES, "apart", Apart)
    monkeypatch.setitem(ENGINES, "poisoned", Poisoned)


def made(rank, ranks, engine, changes):
    """(config, blueprint, run) with dropout, so that what is recomputed must draw the same."""
    ENGINES.update(apart=Apart, poisoned=Poisoned)  # a process that was started knows them not
    always = {"model__hidden_dropout": 0.1, "train__global_batch_size": 4}
    config = tiny_config(**always | changes, parallel__engine=engine)
    blueprint = draw(config, ranks)
    ctx = context(blueprint, rank)
    return config, blueprint, assemble(config, blueprint, ctx)


def trained(rank, ranks, engine, changes):
    """Losses, gradient norms, an evaluation's loss and the state's hash, over two steps."""
    config, blueprint, run = made(rank, ranks, engine, changes)
    seen = [state_hash(run)]
    for step in range(2):
        run.progress.step = step
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
        result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
        seen += [result.loss.item(), result.update.grad_norm.item()]
        seen += evaluation_step(run, batches).tolist()
    return [*seen, state_hash(run)]


ALONE = {
    "everything kept": {},
    "untied": {UNTIED: True},
    "groups of two recomputed": recompute("full", "uniform", 2),
    "one block recomputed": recompute("full", "block", 1),
    "parts recomputed": SELECTIVE,
    "bf16": {BF16: True},
    "gradients through autograd": {"precision__gradient_accumulation_fusion": False},
}
WITHOUT_MEMORY = ("everything kept", "groups of two recomputed")
LAYOUTS = {
    "dp2": (2, {}),
    "dp2, sharded, recomputed": (2, {ZERO: 1, **recompute("full", "uniform", 1)}),
    "tp2 with sequence parallelism": (2, {TP: 2, SP: True}),
    "pp2 x dp2, zb-v": (4, {PP: 2, SCHEDULE: "zb-v"}),
}
TOGETHER = dict(zip(LAYOUTS, ("slow", "ci", "slow", "ci"), strict=True))


@pytest.mark.parametrize("name", ALONE)
def test_weights_that_are_whole_in_the_hooks_only_train_alike(name):
    plain = trained(0, 1, "zero", ALONE[name])
    assert trained(0, 1, "poisoned", ALONE[name]) == plain
    if name in WITHOUT_MEMORY:  # a read outside the hooks would end the process: poison comes first
        assert trained(0, 1, "apart", ALONE[name]) == plain


def trained_by_both(rank, ranks, changes):
    """By the engine that keeps weights apart, and by ours."""
    return [trained(rank, ranks, engine, changes) for engine in ("apart", "zero")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=getattr(pytest.mark, mark)) for name, mark in TOGETHER.items()],
)
def test_weights_in_shards_train_alike(name):
    ranks, changes = LAYOUTS[name]
    for apart, whole in spawn(trained_by_both, ranks, changes):
        assert apart == whole


@pytest.mark.parametrize("optimizer", [True, False], ids=["whole state", "weights, as imported"])
def test_weights_that_lie_apart_are_filled_from_a_checkpoint_and_saved(tmp_path, optimizer):
    """Of bf16 weights the masters are filled, too; what is saved again is the same."""
    _, _, whole = made(0, 1, "zero", {BF16: True, "train__seed": 5})
    for held in whole.engine.state(owned=False):
        held.data.add_(1e-4)  # masters that are not rounded, moments that are not zero
    for name, weight in named(whole.engine.weights(owned=False)).items():
        weight.copy_(exact_weights(whole.engine)[name])
    runs, hashes = [whole], [state_hash(whole)]
    for engine in ("apart", "zero"):
        store = Store(tmp_path / engine, runs[-1].ctx)
        state = runs[-1].engine.state(owned=True) if optimizer else ()
        weights = runs[-1].engine.weights(owned=True)
        store.save(
            store.snapshot(
                1,
                weights=weights,
                optimizer=state,
                progress=Progress(1, 1, lr_samples=1, optimizer_steps=1),
            )
        )
        runs.append(made(0, 1, engine, {BF16: True})[2])
        fill_run(runs[-1], store, store.newest_intact()[0], optimizer=optimizer)
        hashes.append(state_hash(runs[-1]))
    assert (hashes[1] == hashes[0]) == optimizer and hashes[2] == hashes[1]
    weights = [named(run.engine.weights(owned=False)) for run in runs]
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight) and torch.equal(weights[2][name], weight)


def split_backward(engine):
    """(gradients by name, weights whole after each action) of two micro batches under I and W."""
    config, blueprint, run = made(0, 1, engine, {})
    batches = make_batches(config, blueprint, 0, 0)
    drops = step_dropout(run.context, 0)
    micro = [to_device(batch, run.ctx.device, dropout=drops) for batch in batches[:2]]
    run.expect_messages(batches[0])
    lists = [[Action.parse(text)] for text in ("0F0", "0I0", "0F1", "0I1", "0W0", "0W1")]
    run.pipeline.run(lists, micro, torch.tensor(0.01))
    run.engine.reduce()
    return {name: g.clone() for name, g in named(run.engine.gradients(owned=False)).items()}, run


def test_a_split_backward_needs_no_weight_for_its_products():
    (ours, run), (plain, _) = split_backward("poisoned"), split_backward("zero")
    assert calls_of(run.engine)[-1][0] == "backward ends", "W calls nothing"
    assert all(gradient.isfinite().all() for gradient in plain.values())
    assert all(torch.equal(ours[name], gradient) for name, gradient in plain.items())


def test_each_layer_is_told_of_its_forward_and_backward_in_turn():
    """Six layers; what is recomputed has a forward more."""
    config, blueprint, run = made(0, 1, "apart", recompute("full", "block", 2))
    calls = calls_of(run.engine)
    calls.clear()
    batches = make_batches(config, blueprint, 0, 0)
    train_step(run, batches, lr=1e-2, weight_decay=0.0)
    for (what, layer), (ends, same) in zip(calls[::2], calls[1::2], strict=True):
        assert (ends, same) == (f"{what} ends", layer)
    of_layer = Counter(calls[::2])
    layers = {layer for _, layer in calls}
    assert len(layers) == 6
    forwards = sorted(of_layer["forward", layer] for layer in layers)
    n = len(batches)
    assert forwards == [n] * 4 + [2 * n] * 2
    assert all(of_layer["backward", layer] == n for layer in layers)


def test_an_engine_without_hooks_puts_nothing_around_a_layer():
    (stage,) = made(0, 1, "zero", {})[2].pipeline.stages.values()
    assert stage.module.hooks == {}
