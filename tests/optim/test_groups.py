"""Several rules in one run, and states of other shapes than their parameters'."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import OPTIMIZERS, treatment
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import CheckpointError, ConfigError
from megatron_lite.config.sections.checkpoint import CheckpointConfig
from megatron_lite.config.sections.optim import LearningRateConfig, OptimConfig
from megatron_lite.optim.rules import RULES
from megatron_lite.parallel.shard import MASTER
from megatron_lite.planner.memory import PlanInputs, memory
from megatron_lite.rehearsal.rehearse import stand_in
from megatron_lite.train.alike import plain
from megatron_lite.train.assemble import assemble
from megatron_lite.train.health.state_hash import state_hash
from megatron_lite.train.resume import resume
from megatron_lite.train.step import train_step
from tests.optim import toys
from tests.support.axes import BF16, BF16_MOMENTS, PP, TP, ZERO
from tests.support.checkpoints import load_and_save_again, train_and_save, whole
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

TOY = {"optim__optimizer": "toy", "model__vocab_size": 64}


@pytest.fixture
def toy(monkeypatch) -> None:
    """--optimizer toy, in this process, until the test ends."""
    optimizers, rules = dict(OPTIMIZERS), dict(RULES)
    toys.install(optimizers, rules)
    for table, new in ((OPTIMIZERS, optimizers), (RULES, rules)):
        for name in new.keys() - table.keys():
            monkeypatch.setitem(table, name, new[name])


def after_a_step(**changes):
    config = tiny_config(**changes)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    train_step(
        run, make_batches(config, blueprint, 0, 0), lr=1e-2, weight_decay=0.1, decoupled_lr=3e-2
    )
    return run


def weights_after_a_step(**changes):
    run = after_a_step(**changes)
    return {
        piece.name: (piece.spec, piece.of(local.parameter.detach()))
        for local in run.parameters
        for piece in local.pieces
    }


def test_each_kind_is_updated_by_its_own_rule_as_if_all_were(toy) -> None:
    """From the same weights and gradient; decay and both learning rates are each tensor's own."""
    mixed, adam, sgd = (
        weights_after_a_step(**TOY | {"optim__optimizer": name}) for name in ("toy", "adam", "sgd")
    )
    rules = set()
    for name, (spec, values) in mixed.items():
        rule = toys.BY_KIND[spec.kind].rule
        rules.add(rule)
        same = {"adam": adam, "sgd": sgd, "factored": mixed}[rule][name][1]
        assert torch.equal(values, same), name
        assert not torch.equal(values, {"adam": sgd}.get(rule, adam)[name][1]), name
    assert rules == {"adam", "sgd", "factored"}


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "toy"])
def test_a_rule_uses_the_states_that_its_row_names(optimizer, toy) -> None:
    optim = OptimConfig(optimizer=optimizer)
    for kind, shape in (("weight", (5, 3)), ("embedding", (7, 2)), ("norm", (4,)), ("bias", (6,))):
        how = treatment(optim, Tensor("a", shape, kind))
        values, gradient = torch.ones(shape), torch.randn(shape)
        state = {s.name: torch.zeros(s.of(shape)) for s in how.states}
        RULES[how.rule](optim).update(
            [values], [gradient], [state], steps=0, lr=0.1, weight_decay=0.0
        )
        assert set(state) == {s.name for s in how.states}
        assert all(tensor.abs().min() > 0 for tensor in state.values()), "kept and not used"


def test_the_state_hash_sees_every_state(toy) -> None:
    run = after_a_step(**TOY | {"model__num_layers": 1})
    hashes = {state_hash(run)}
    for piece in run.engine.state(owned=False):
        piece.data.view(-1)[-1] += 1.0
        hashes.add(state_hash(run))
    assert len(hashes) == 1 + len(list(run.engine.state(owned=False))) > 20


def test_a_checkpoint_that_lacks_the_states_of_some_kinds_is_refused_with_the_first(
    toy, tmp_path
) -> None:
    """Whatever this rank itself holds of them."""
    changes = TOY | {"model__num_layers": 1}
    run = after_a_step(**changes | {"optim__optimizer": "adam"})
    store = Store(tmp_path, run.ctx)
    progress = Progress(1, 8, 128, lr_samples=8, optimizer_steps=1)
    weights, state = run.engine.weights(owned=True), run.engine.state(owned=True)
    told = plain(tiny_config(**changes))
    store.save(store.snapshot(1, weights=weights, optimizer=state, progress=progress, config=told))
    other = after_a_step(**changes)
    config, rates = CheckpointConfig(load=str(tmp_path)), LearningRateConfig(lr=1e-2)
    with pytest.raises(CheckpointError) as error:
        resume(other, config, rates, lambda batches: None, {"vocab_size": 64})
    said = str(error.value)
    assert "no state of this optimizer for 30 of 34 tensors" in said
    assert "momentum.blocks.0.attention_norm.weight first" in said and "--no-load-optim" in said


def test_sgd_without_momentum_keeps_nothing() -> None:
    config = tiny_config(optim__optimizer="sgd", optim__sgd_momentum=0.0)
    assert draw(config, 1).held(0).state_bytes == 0


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {BF16: True, ZERO: 1}),
        (4, {PP: 2, ZERO: 1}),
        (2, {TP: 2, "optim__optimizer": "adam"}),
        (4, {TP: 2, ZERO: 1, "optim__optimizer": "adafactor"}),
        (2, {TP: 2, "optim__optimizer": "adam8bit", "optim__adam8bit_block_size": 16}),
        (1, {"optim__optimizer": "sgd"}),
        (2, {ZERO: 1, "optim__optimizer": "muon"}),
        (2, {ZERO: 1, "optim__optimizer": "galore", "optim__galore_rank": 5}),
        (2, {ZERO: 1, "optim__optimizer": "adam"} | BF16_MOMENTS),
        (1, {"optim__optimizer": "adam"} | BF16_MOMENTS | {"optim__exp_avg_dtype": "fp32"}),
    ],
)
def test_the_plan_counts_the_states_that_are_there(ranks, changes, toy) -> None:
    """Byte by byte, over the ranks that share them."""
    config = tiny_config(**TOY | changes)
    blueprint = draw(config, ranks)
    asked = PlanInputs(
        config.parallel, config.precision, config.train.micro_batch_size, on_gpu=False
    )
    planned = memory(blueprint, asked)
    grid = blueprint.grid
    for pp in range(grid.pp):
        held = []
        for dp in range(grid.dp):
            with stand_in(config, blueprint, grid.rank(dp=dp, pp=pp)) as actor:
                state = [s for s in actor.run.engine.state(owned=False)]
                held += [s.data.nbytes for s in state if not s.name.startswith(MASTER)]
        shared = 1 if config.parallel.shares_state else grid.dp
        assert sum(held) == blueprint.held(pp).state_bytes * shared
        assert planned[pp].kinds["moments"] == pytest.approx(sum(held) / grid.dp)


def test_a_state_that_tp_would_cut_is_refused_with_the_way_out(toy) -> None:
    with pytest.raises(
        ConfigError, match=r"needs all of its 32 rows.*--tensor-model-parallel"
    ) as e:
        draw(tiny_config(**TOY | {TP: 2, "model__num_layers": 2}), 2)
    assert "blocks.0.attention.q.weight" in str(e.value) and "factored" in str(e.value)
    draw(tiny_config(**TOY | {PP: 2}), 2)
    draw(tiny_config(**TOY | {TP: 2, "optim__optimizer": "adam"}), 2)


def toy_saved(rank, ranks, *arguments):
    toys.install()
    return train_and_save(rank, ranks, *arguments)


def toy_loaded(rank, ranks, *arguments):
    toys.install()
    return load_and_save_again(rank, ranks, *arguments)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param((2, {ZERO: 1}), (1, {}), id="shared to one"),
        pytest.param((2, {PP: 2}), (2, {ZERO: 1}), id="stages to shared", marks=pytest.mark.slow),
    ],
)
def test_three_rules_resume_in_any_layout_and_bit_for_bit_in_their_own(
    tmp_path, saved, loaded
) -> None:
    folder, other, same = (str(tmp_path / name) for name in ("saved", "other", "same"))
    (ranks, changes), (others, elsewhere) = saved, loaded
    went_on = spawn(toy_saved, ranks, TOY | changes, folder, 2, 2)
    resumed = spawn(toy_loaded, ranks, TOY | changes, folder, same, 2)
    assert resumed == went_on
    moved = spawn(toy_loaded, others, TOY | elsewhere, folder, other, 2)
    assert moved[0] == pytest.approx(went_on[0], rel=1e-6)
    assert whole(tmp_path / "saved") == whole(tmp_path / "other") == whole(tmp_path / "same")
    names = {name.partition(".")[0] for name in whole(tmp_path / "saved")}
    assert names >= {"row", "column", "mean", "exp_avg", "exp_avg_sq", "momentum"}


def test_layouts_agree_on_what_a_state_has(toy) -> None:
    """Names, shapes and places of all states tile each global tensor, whoever shares them."""
    config = tiny_config(**TOY | {PP: 2, ZERO: 1})
    blueprint = draw(config, 4)
    found: dict[str, int] = {}
    shapes = {}
    for rank in range(4):
        with stand_in(config, blueprint, rank) as actor:
            for piece in actor.run.engine.state(owned=True):
                found[piece.name] = found.get(piece.name, 0) + piece.data.numel()
                shapes[piece.name] = piece.shape
    assert found == {name: math.prod(shape) for name, shape in shapes.items()}
    assert shapes["row.blocks.0.mlp.up.weight"] == (128,)
    assert shapes["column.blocks.0.mlp.up.weight"] == (32,)
    assert shapes["mean.blocks.0.mlp.up.weight"] == ()
