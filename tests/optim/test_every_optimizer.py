"""What holds of every row of OPTIMIZERS: layouts, resume, updates that are not taken, what the plan counts."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.blueprint.optimizers import CURVATURE, OPTIMIZERS, treatment
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.rules.table import problems
from megatron_lite.parallel.shard import MASTER
from megatron_lite.rehearsal.rehearse import stand_in
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, PP, TP, ZERO
from tests.support.checkpoints import same_in_every_way
from tests.support.tiny import context, draw, make_batches, tiny_config

ON_A_GPU = ("apex-adam",)
"""Their kernels are made for one."""
ROWS = [
    pytest.param(name, marks=pytest.mark.gpu if name in ON_A_GPU else ()) for name in OPTIMIZERS
]
SMALL = {"model__num_layers": 2, "model__vocab_size": 64}
LAYOUTS = {"tp2": {TP: 2}, "pp2": {PP: 2}, "dp2 shared": {ZERO: 1}}
SETTINGS = {
    "adam8bit": {"optim__adam8bit_block_size": 16},
    "muon": {"optim__muon_fp32_matmul_prec": "highest"},
}
"""Of rows whose defaults are for larger matrices, or round in between."""
SELDOM = (f"{CURVATURE.name}.", "left_basis.", "right_basis.")
"""Names of states that are made anew every so many updates only."""
IN_CI = {("sophiag", "dp2 shared")}
"""The others are nightly's; a row's own tests hold what it needs of a layout."""


def asked(name, **changes):
    return SMALL | {"optim__optimizer": name} | SETTINGS.get(name, {}) | changes


def assembled(changes):
    config = tiny_config(**changes)
    blueprint = draw(config, 1)
    return config, blueprint, assemble(config, blueprint, context(blueprint, 0, DEVICE))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(config, blueprint, run):
    batches = make_batches(config, blueprint, 0, run.progress.step)
    train_step(run, batches, lr=1e-3, weight_decay=0.1)
    run.progress.step += 1


def held(run):
    every = [*run.engine.weights(owned=True), *run.engine.state(owned=True)]
    return {piece.name: piece.data.clone() for piece in every}


@pytest.mark.parametrize("name", ROWS)
def test_what_the_device_does_not_take_leaves_every_bit(name) -> None:
    """Also of a gradient that overflowed; the next update is as if there had been none."""
    config, blueprint, run = assembled(asked(name))
    _, _, other = assembled(asked(name))
    assert not run.engine.waits_because
    for _ in range(2):
        step(config, blueprint, run)
        step(config, blueprint, other)
    before, apply = held(run), run.engine.apply

    def not_taken(norm, **rates):
        for piece in run.engine.gradients(owned=False):
            piece.data.view(-1)[::3] = torch.inf
        return apply(norm, **rates, taken=torch.tensor(False, device=DEVICE))

    run.engine.apply = not_taken
    train_step(run, make_batches(config, blueprint, 0, 1), lr=1e-3, weight_decay=0.1)
    run.engine.apply = apply
    run.engine.take_back()
    after = held(run)
    assert after.keys() == before.keys()
    assert [n for n in after if not torch.equal(after[n], before[n])] == []
    step(config, blueprint, run)
    step(config, blueprint, other)
    ours, theirs = held(run), held(other)
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    still = {n for n in ours if torch.equal(ours[n], before[n]) and not n.startswith(SELDOM)}
    assert not still, "the update before moves them, or the test sees nothing"


@pytest.mark.parametrize(
    "changes",
    [{}, {ZERO: 1, BF16: True}, {TP: 2}],
    ids=["alone", "dp2 shared bf16", "tp2"],
)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ON_A_GPU])
def test_the_plan_counts_the_bytes_of_its_states(name, changes) -> None:
    ranks = 2 if changes else 1
    config = tiny_config(**asked(name, **changes))
    try:
        blueprint = draw(config, ranks)
    except ConfigError as error:
        assert "--tensor-model-parallel-size 2 cuts them" in str(error) and TP in changes
        return
    grid = blueprint.grid
    kept = []
    for dp in range(grid.dp):
        for tp in range(grid.tp):
            with stand_in(config, blueprint, grid.rank(dp=dp, tp=tp)) as actor:
                state = actor.run.engine.state(owned=False)
                kept.append(sum(s.data.nbytes for s in state if not s.name.startswith(MASTER)))
    if grid.tp > 1:
        assert set(kept) == {blueprint.held(0).state_bytes}
    else:
        assert sum(kept) == blueprint.held(0).state_bytes


@pytest.mark.parametrize("name", ROWS)
def test_it_works_beside_another_one(name) -> None:
    """As the rule of a group; the tensors outside it are those of the other alone."""
    changes = {"optim__optimizer": "sgd", "optim__param_groups": [f"blocks.1.*:rule={name}"]}
    config, blueprint, run = assembled(asked(name, **changes))
    for _ in range(2):
        step(config, blueprint, run)
    states = {piece.name for piece in run.engine.state(owned=True)}
    for spec in blueprint.parameters:
        rule = treatment(config.optim, spec.tensor)
        alone = tiny_config(**asked(name if spec.name.startswith("blocks.1.") else "sgd")).optim
        assert rule == treatment(alone, spec.tensor)
        assert {f"{state.name}.{spec.name}" for state in rule.states} <= states


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name, layout, id=f"{name}-{layout}",
            marks=pytest.mark.ci if (name, layout) in IN_CI else pytest.mark.slow,
        )
        for name in OPTIMIZERS if name not in ON_A_GPU for layout in LAYOUTS
    ],
)  # fmt: skip
def test_every_layout_equals_one_process_and_resumes_exactly(name, layout, tmp_path) -> None:
    changes = LAYOUTS[layout]
    try:
        draw(tiny_config(**asked(name, **changes)), 2)
    except ConfigError as error:
        assert "--tensor-model-parallel-size 2 cuts them" in str(error) and layout == "tp2"
        return
    same_in_every_way(tmp_path, asked(name), changes, steps=2, more=3, close=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ON_A_GPU])
def test_blocks_that_are_drawn_train_by_it_or_it_is_refused(name, tmp_path) -> None:
    drawn = {"optim__lisa_layers": 1, "optim__lisa_interval": 2, "train__seed": 6}
    refused = problems(tiny_config(**asked(name, train__train_iters=1, **drawn)), 1)
    if refused:
        assert [p for p in refused if "--lisa-layers" in p and f"--optimizer {name}" in p]
        return
    same_in_every_way(tmp_path, asked(name, **drawn), {ZERO: 1}, steps=3, more=3, close=1e-5)
