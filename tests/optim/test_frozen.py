"""A set of trained parameters that changes: the token table begins after two updates, a piece after three."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_lite.blueprint.optimizers import ADAM, OPTIMIZERS
from megatron_lite.blueprint.turns import From
from megatron_lite.engines.buckets import GradientBuckets
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import FULL, PP, ZERO
from tests.support.checkpoints import load_and_save_again, train_and_save, whole
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

TABLE, KEY = "embedding.tokens.weight", "blocks.1.attention.k.weight"
BEGINS = {TABLE: 2, KEY: 3}
"""The first update of each."""
LATE = {"optim__optimizer": "late", "model__vocab_size": 64}


def late(optim, tensor):
    """Adam, but the table, and one piece of a fused matrix, begin later.

    Where ranks share the state one keeps the table's, the other the piece's.
    """
    if tensor.name not in BEGINS:
        return ADAM
    return replace(ADAM, turns=From(BEGINS[tensor.name]), needs_whole_matrix=True)


@pytest.fixture(autouse=True)
def known(monkeypatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "late", late)


def trained(updates, **changes):
    """Per step of one process: gradient norm, squares of gradients by name, weights after it."""
    config = tiny_config(**{"train__global_batch_size": 4} | LATE | changes)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    seen, apply = [], run.engine.apply

    def look(norm, **rates):
        squares = {
            s.name: s.data.double().square().sum().item() for s in run.engine.gradients(owned=True)
        }
        update = apply(norm, **rates)
        weights = {s.name: s.data.clone() for s in run.engine.weights(owned=True)}
        seen.append((norm.item(), squares, weights, update))
        return update

    run.engine.apply = look
    for step in range(updates):
        train_step(run, make_batches(config, blueprint, 0, step), lr=1e-2, weight_decay=0.0)
    return seen


def test_frozen_tensors_stand_still_and_begin_with_a_first_step_of_their_own() -> None:
    plain = trained(1, optim__optimizer="adam")
    seen = trained(4, telemetry__log_num_zeros_in_grad=True)
    for name in BEGINS:
        assert plain[0][1][name] > 0
        before = seen[0][2][name]
        for step, (_, squares, weights, _) in enumerate(seen):
            moves = step >= BEGINS[name]
            assert (squares[name] > 0) is moves
            assert torch.equal(weights[name], before) is not moves
            if step == BEGINS[name]:  # bias-corrected for one gradient: a step of the learning rate
                moved = (weights[name] - before).abs()
                assert moved.max().item() == pytest.approx(1e-2, rel=1e-2)
                assert moved.median().item() == pytest.approx(1e-2, rel=0.1)
            before = weights[name]
    whole_norm, squares, _, _ = plain[0]
    others = math.fsum(square for name, square in squares.items() if name not in BEGINS)
    assert math.sqrt(math.fsum(squares.values())) == pytest.approx(whole_norm, rel=1e-6)
    assert seen[0][0] == pytest.approx(math.sqrt(others), rel=1e-6)
    assert seen[0][0] < 0.99 * whole_norm
    assert seen[0][3].num_zeros < seen[0][2][TABLE].numel()


def test_what_is_recomputed_above_a_frozen_table_has_its_gradients() -> None:
    small = {"model__num_layers": 2, "train__global_batch_size": 2}
    for (norm, squares, _, _), (again, others, _, _) in zip(
        trained(1, **small), trained(1, **small | FULL), strict=True
    ):
        assert again == pytest.approx(norm, rel=1e-5)
        assert others == pytest.approx(squares, rel=1e-4, abs=1e-12)


def late_saved(rank, ranks, *arguments):
    OPTIMIZERS["late"] = late
    return train_and_save(rank, ranks, *arguments)


def late_loaded(rank, ranks, *arguments):
    OPTIMIZERS["late"] = late
    return load_and_save_again(rank, ranks, *arguments)


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({ZERO: 1}, id="dp2 shared"),
        pytest.param({}, id="dp2", marks=pytest.mark.slow),
        pytest.param({PP: 2}, id="pp2", marks=pytest.mark.slow),
    ],
)
def test_every_layout_thaws_at_the_same_step_also_after_a_resume(tmp_path, changes) -> None:
    """Saved by two ranks one update before the change, taken up by them and by one."""
    folder, same, alone = (str(tmp_path / name) for name in ("saved", "same", "alone"))
    went_on = spawn(late_saved, 2, LATE | changes, folder, 1, 3)
    assert spawn(late_loaded, 2, LATE | changes, folder, same, 3) == went_on
    moved = spawn(late_loaded, 1, LATE, folder, alone, 3)
    assert moved[0] == pytest.approx(went_on[0], rel=1e-6)
    hashes = whole(tmp_path / "saved")
    assert hashes == whole(tmp_path / "same") == whole(tmp_path / "alone")
    assert hashes[f"exp_avg.{TABLE}"] == hashes[f"exp_avg_sq.{TABLE}"], "not zero yet"


def begun_early(rank, ranks):
    """Of each step: buckets, and how many were under way before the step waited for them."""
    OPTIMIZERS["late"] = late
    config = tiny_config(**LATE, parallel__ddp_bucket_size=3000)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    finish, counts = GradientBuckets.finish, []

    def look(self):
        counts.append((len(self.buckets), sum(b.reducing is not None for b in self.buckets)))
        finish(self)

    GradientBuckets.finish = look  # type: ignore[method-assign]
    for step in range(3):
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step)
        train_step(run, batches, lr=1e-2, weight_decay=0.0)
    return counts


@pytest.mark.ci
def test_no_bucket_waits_for_the_gradient_of_a_frozen_parameter() -> None:
    for counts in spawn(begun_early, 2):
        assert all(number == begun and number > 3 for number, begun in counts)
