"""LISA (arXiv:2403.17919): some blocks train at a time, and only they have gradients and states."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import ADAM, treatment
from megatron_lite.blueprint.turns import BlockDraw, OfBlock
from megatron_lite.config.rules.table import problems
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.rules import RULES
from megatron_lite.parallel.shard import MASTER
from megatron_lite.rehearsal.rehearse import stand_in
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, PP, SCHEDULE, TP, ZERO
from tests.support.checkpoints import same_in_every_way
from tests.support.tiny import context, draw, make_batches, tiny_config

GROUPED, EVERY = "optim__lisa_layers", "optim__lisa_interval"
SMALL = {"train__global_batch_size": 2, "model__vocab_size": 64}
ENDS = ("embedding.", "final_norm.", "head.")


def block_of(name):
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def weights(engine):
    return {s.name: s.data.clone() for s in engine.weights(owned=True)}


def states(engine):
    return {s.name: s.data.clone() for s in engine.state(owned=False)}


def assembled(**changes):
    config = tiny_config(**SMALL | changes)
    blueprint = draw(config, 1)
    return config, blueprint, assemble(config, blueprint, context(blueprint, 0))


def steps(config, blueprint, run, updates):
    """Of each: what it begins with, and what a step that follows it changes."""
    for step in range(updates):
        yield step
        train_step(run, make_batches(config, blueprint, 0, step), lr=1e-2, weight_decay=0.1)


def test_a_draw_is_even_and_a_function_of_seed_and_interval() -> None:
    drawn = BlockDraw(8, 2, 5, seed=1234)
    intervals = [drawn.at(5 * n) for n in range(4000)]
    assert all(len(blocks) == 2 for blocks in intervals)
    assert all(drawn.at(5 * n + k) == intervals[n] for n in range(20) for k in range(5))
    counts = Counter(block for blocks in intervals for block in blocks)
    # 1000 each, standard deviation 27
    assert sorted(counts) == list(range(8)) and all(abs(n - 1000) < 110 for n in counts.values())
    assert [replace(drawn, seed=1).at(5 * n) for n in range(20)] != intervals[:20]
    pairs = Counter(tuple(sorted(blocks)) for blocks in intervals)
    assert len(pairs) == 28 and all(abs(n - 4000 / 28) < 60 for n in pairs.values())


def test_a_row_of_intervals_is_found_from_any_update_in_it() -> None:
    drawn = BlockDraw(4, 2, 3, seed=7)
    for block in range(4):
        begun, turn = None, OfBlock(drawn, block)
        for n in range(150):
            if block not in drawn.at(n):
                begun = None
            elif begun is None:
                begun = n
            assert turn.begun(n) == begun and turn.trains(n) == (begun is not None)


def test_after_ten_intervals_every_block_has_changed_and_no_other_than_those_drawn() -> None:
    """Bit for bit; the ends of the model change in every step."""
    config, blueprint, run = assembled(**{GROUPED: 2, EVERY: 2})
    first = before = weights(run.engine)
    for step in steps(config, blueprint, run, 20):
        if step:
            now = weights(run.engine)
            active = blueprint.draw.at(step - 1)
            for name, value in now.items():
                moved = not torch.equal(value, before[name])
                assert moved is (block_of(name) is None or block_of(name) in active), (step, name)
            before = now
        kept = {block_of(name.partition(".")[2]) for name in states(run.engine)}
        assert kept == {None, *blueprint.draw.at(step)}
    last = weights(run.engine)
    assert not any(torch.equal(last[name], value) for name, value in first.items())


def test_an_interval_is_that_of_a_fresh_optimizer_over_what_trains() -> None:
    """torch's AdamW, its state of a block thrown away where its row of intervals ends."""
    changes = {GROUPED: 1, EVERY: 2, "optim__clip_grad": 0.0}
    config, blueprint, run = assembled(**changes)
    theirs = {name: value.requires_grad_() for name, value in weights(run.engine).items()}
    optim = config.optim
    others = {
        name: torch.optim.AdamW([value], lr=1e-2, betas=(optim.adam_beta1, optim.adam_beta2),
                                weight_decay=0.1 if value.ndim == 2 else 0.0, eps=optim.adam_eps)
        for name, value in theirs.items()
    }  # fmt: skip
    apply, again = run.engine.apply, 0

    def both(norm, **rates):
        got = {piece.name: piece.data.clone() for piece in run.engine.gradients(owned=True)}
        squares = sum(g.double().square().sum() for g in got.values())
        assert norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-6)
        for name, other in others.items():
            if name in got:
                theirs[name].grad = got[name]
                other.step()
            else:
                other.state.clear()
        return apply(norm, **rates)

    run.engine.apply = both
    for step in steps(config, blueprint, run, 16):
        again += (
            step % 2 == 0 and step > 0 and blueprint.draw.at(step) == blueprint.draw.at(step - 1)
        )
    assert again, "one block was drawn twice in a row"
    for name, value in weights(run.engine).items():
        torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-6, atol=1e-7, msg=name)


def accumulators(engine):
    """Bytes of the storages that hold the accumulators."""
    storages = {
        v.untyped_storage().data_ptr(): v.untyped_storage() for _, v in engine.accumulators()
    }
    return sum(storage.nbytes() for storage in storages.values())


def test_there_is_memory_for_what_trains_alone() -> None:
    config, blueprint, run = assembled(**{GROUPED: 1, EVERY: 1})
    _, whole_plan, whole_run = assembled()
    held, whole_held = blueprint.held(0), whole_plan.held(0)
    for _ in steps(config, blueprint, run, 3):
        kept = sum(value.nbytes for value in states(run.engine).values())
        assert kept == held.state_bytes < 0.5 * whole_held.state_bytes
        assert accumulators(run.engine) == pytest.approx(4 * held.accumulated, rel=0.01)
    assert accumulators(whole_run.engine) == pytest.approx(4 * whole_held.accumulated, rel=0.01)
    assert held.accumulated < 0.5 * whole_held.accumulated
    assert held.num_trained == whole_held.num_trained


def test_an_update_that_is_taken_back_at_a_border_leaves_the_states_that_were() -> None:
    """The device finds a step bad after the next one has begun, with other blocks."""
    changes = {GROUPED: 1, EVERY: 2, "train__seed": 5}
    config, blueprint, run = assembled(**changes)
    list(steps(config, blueprint, run, 1))
    assert blueprint.draw.at(1) != blueprint.draw.at(2), "another seed is needed"
    before, kept = weights(run.engine), states(run.engine)
    batches = make_batches(config, blueprint, 0, 1)
    apply = run.engine.apply

    def refused(norm, **rates):
        return apply(norm, **rates, taken=torch.tensor(False))

    run.engine.apply = refused
    train_step(run, batches, lr=1e-2, weight_decay=0.1)
    run.engine.apply = apply
    assert run.engine.progress().steps == 2
    run.engine.take_back()
    after = states(run.engine)
    assert after.keys() == kept.keys() and all(torch.equal(after[n], kept[n]) for n in kept)
    assert all(torch.equal(v, before[n]) for n, v in weights(run.engine).items())
    train_step(run, batches, lr=1e-2, weight_decay=0.1)
    other_config, other_plan, other = assembled(**changes)
    list(steps(other_config, other_plan, other, 2))
    ours, theirs = weights(run.engine), weights(other.engine)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({GROUPED: 4}, "--lisa-layers 4 of --num-layers 4 draws all of them"),
        ({GROUPED: 0}, "--lisa-layers 0 must be at least 1"),
        ({GROUPED: 1, EVERY: 0}, "--lisa-interval 0 must be at least 1"),
        ({EVERY: 3}, "--lisa-interval 3 needs --lisa-layers"),
        ({GROUPED: 1, "optim__optimizer": "sophiag"}, "before its curvature was seen"),
        ({GROUPED: 1, "lora__lora_rank": 2}, "--lisa-layers and --lora-rank exclude each other"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, said) -> None:
    found = problems(tiny_config(**changes | {"train__train_iters": 1}), 1)
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(1, {}), (2, {ZERO: 1, BF16: True}), (2, {PP: 2})],
)
def test_the_plan_is_that_of_the_fullest_draw(ranks, changes) -> None:
    """No rank ever keeps more; with each block on the ranks of one stage it is reached."""
    size = {"train__global_batch_size": 4}
    config = tiny_config(**SMALL | size | changes | {GROUPED: 2, EVERY: 1})
    blueprint = draw(config, ranks)
    grid = blueprint.grid
    for pp in range(grid.pp):
        kept = [0] * 12
        for dp in range(grid.dp):
            with stand_in(config, blueprint, grid.rank(dp=dp, pp=pp)) as actor:
                engine = actor.run.engine
                for step in range(len(kept)):
                    engine.resume(replace(engine.progress(), steps=step))
                    state = [s for s in engine.state(owned=False) if not s.name.startswith(MASTER)]
                    kept[step] += sum(piece.data.nbytes for piece in state)
        assert max(kept) == blueprint.held(pp).state_bytes
        assert (min(kept) < max(kept)) is (grid.pp > 1)


ASKED = SMALL | {GROUPED: 1, EVERY: 3, "train__global_batch_size": 4, "train__seed": 6}
H1 = {PP: 2, SCHEDULE: "zb-h1"}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("changes", "before"),
    [
        pytest.param({PP: 2}, 2, id="pp2 within an interval"),
        pytest.param({ZERO: 1}, 3, id="dp2 shared at a border", marks=pytest.mark.slow),
        pytest.param({TP: 2}, 4, id="tp2", marks=pytest.mark.slow),
        pytest.param(H1, 2, id="split backward", marks=pytest.mark.slow),
        pytest.param({ZERO: 1, BF16: True}, 4, id="dp2 bf16", marks=pytest.mark.slow),
    ],
)
def test_every_layout_draws_alike_also_after_a_resume_in_another(tmp_path, changes, before) -> None:
    half = {BF16: True} if BF16 in changes else {}
    hashes = same_in_every_way(
        tmp_path, ASKED | half, changes, steps=before, more=5, close=2e-3 if half else 1e-6
    )
    drawn = draw(tiny_config(**ASKED), 1).draw
    kept = {
        block_of(name.removeprefix("exp_avg.")) for name in hashes if name.startswith("exp_avg.")
    }
    assert drawn is not None and kept == {None, *drawn.at(before)}
    assert not drawn.at(0) & drawn.at(3) and drawn.at(3) != drawn.at(6), "another seed is needed"


def test_only_blocks_are_drawn() -> None:
    drawn = BlockDraw(4, 1, 5, seed=3)
    for name in ("embedding.tokens.weight", "final_norm.weight", "head.weight", "rotary.up"):
        assert treatment(OptimConfig(), Tensor(name, (2, 2), "weight"), drawn) == ADAM
    how = treatment(OptimConfig(), Tensor("blocks.12.mlp.up.weight", (2, 2), "weight"), drawn)
    assert how.turns == OfBlock(drawn, 12) and how.rule in RULES
