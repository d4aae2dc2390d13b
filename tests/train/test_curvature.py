"""Training with Sophia-G: its pass in every layout, number format, resumed, and what is said of it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lite.blueprint.plan import describe
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.rules.table import check_config
from megatron_lite.planner.forecast import forecast
from megatron_lite.planner.hardware import Cluster, find_device
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import CHUNKS, PP, SP, TP, ZERO
from tests.support.checkpoints import load_and_save_again, train_and_save, whole
from tests.support.engines import counted, named
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config
from tests.train.toys import ROWS

STEPS = 6
SOPHIA = {
    "optim__optimizer": "sophiag", "optim__sophia_hessian_interval": 3,
    "optim__sophia_rho": 2.0, "optim__sophia_beta2": 0.8,
}  # fmt: skip


def begun(rank, ranks, changes):
    config = tiny_config(**SOPHIA | changes)
    blueprint = draw(config, ranks)
    return config, blueprint, assemble(config, blueprint, context(blueprint, rank))


def stepped(begun, step, lr=3e-3):
    config, blueprint, run = begun
    run.progress.step = step
    batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
    return train_step(run, batches, lr=lr, weight_decay=0.1)


def hessians(run):
    """Sum of each tensor's curvature here, of what no other rank stands for."""
    found = {}
    for piece in counted(run.engine.state(owned=True), run.ctx):
        if piece.name.startswith("hessian."):
            found[piece.name] = found.get(piece.name, 0.0) + piece.data.double().sum().item()
    return found


def trained(rank, ranks, changes):
    """(loss, gradient norm, told) of each step, and the curvature that is here."""
    at = begun(rank, ranks, changes)
    steps = []
    for step in range(STEPS):
        result = stepped(at, step)
        steps.append((result.loss.item(), result.update.grad_norm.item(), dict(result.metrics)))
    return steps, hessians(at[2])


@pytest.fixture(scope="module")
def serial():
    return trained(0, 1, {})


def test_the_pass_is_told_and_what_it_observes_is_used(serial) -> None:
    steps, found = serial
    told = {"curvature/loss", "curvature/grad_norm", "curvature/win_rate"}
    assert [set(metrics) for _, _, metrics in steps] == [told, set(), set()] * 2
    # the loss of drawn labels is about the entropy of the outputs, log 61 at the start
    assert steps[0][2]["curvature/loss"] == pytest.approx(math.log(61), rel=0.02)
    assert all(0.05 < steps[n][2]["curvature/win_rate"] < 0.95 for n in (0, 3))
    assert all(total > 0.0 for total in found.values()) and found


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(2, {TP: 2, SP: True}, id="tp2, sp"),
        pytest.param(2, {PP: 2, ZERO: 1}, id="pp2"),
        pytest.param(2, {ZERO: 1}, id="dp2, sharded", marks=pytest.mark.ci),
        pytest.param(1, {"parallel__logits_chunk_mib": 0.001}, id="logits in chunks",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_layout_draws_the_same_labels_and_trains_the_same_model(serial, ranks, changes) -> None:
    found = spawn(trained, ranks, changes)
    for steps, _ in found:
        for (loss, norm, told), (its_loss, its_norm, its_told) in zip(
            steps, serial[0], strict=True
        ):
            assert loss == pytest.approx(its_loss, rel=2e-5)
            assert norm == pytest.approx(its_norm, rel=1e-3)
            # a coordinate at the clip may fall on its other side
            assert told == pytest.approx(its_told, rel=2e-3)
    total = {}
    for _, here in found:
        for name, value in here.items():
            total[name] = total.get(name, 0.0) + value
    assert total == pytest.approx(serial[1], rel=2e-3)


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_in_half_precision_the_curvature_is_that_of_fp32(low) -> None:
    """fp16's gradient is unscaled before it is squared: else the curvature would be 2^32 times as large."""
    exact, half = (
        begun(0, 1, changes)
        for changes in ({}, {f"precision__{low}": True, "precision__initial_loss_scale": 2**16})
    )
    for at in (exact, half):
        stepped(at, 0)
    found, expected = hessians(half[2]), hessians(exact[2])
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.02)
    state = named(half[2].engine.state(owned=True))
    assert {t.dtype for n, t in state.items() if n.startswith("hessian.")} == {torch.float32}


def test_a_pass_that_is_not_finite_leaves_the_curvature_as_it_was_and_says_so() -> None:
    at = begun(0, 1, {"precision__fp16": True, "precision__initial_loss_scale": 2.0**24})
    result = stepped(at, 0)
    assert "iteration 1: the gradient of drawn labels is not finite" in result.warnings[0]
    assert result.update.skipped and set(hessians(at[2]).values()) == {0.0}
    assert "curvature/win_rate" not in result.metrics


@pytest.mark.ci
def test_half_of_the_micro_batches_are_half_of_the_global_batch_at_every_dp() -> None:
    """And B is the tokens of that half: the curvature is of the same size."""
    half = {"optim__sophia_hessian_fraction": 0.5, ZERO: 1}
    steps, _ = trained(0, 1, half)
    for rank_steps, _ in spawn(trained, 2, half):
        for (_, _, told), (_, _, its_told) in zip(rank_steps, steps, strict=True):
            assert told == pytest.approx(its_told, rel=2e-3)
    often = {"optim__sophia_hessian_interval": 1, "optim__sophia_beta2": 0.99}
    whole, part = (hessian_after(6, often | changes) for changes in ({}, half))
    assert part != whole and part == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize(
    ("layout", "fraction", "expected"),
    [({}, 0.5, 4), ({}, 0.3, 3), ({}, 1.0, 8), ({PP: 2, CHUNKS: 2}, 0.3, 4), ({PP: 2}, 0.3, 3)],
)
def test_an_interleaved_pipeline_reads_as_many_as_its_schedule_takes(
    layout, fraction, expected
) -> None:
    config = tiny_config(**SOPHIA, optim__sophia_hessian_fraction=fraction, **layout)
    assert draw(config, 1 + (PP in layout)).curvature_microbatches(8) == expected


def hessian_after(steps, changes):
    at = begun(0, 1, changes)
    for step in range(steps):
        stepped(at, step, lr=0.0)
    return sum(hessians(at[2]).values())


def test_a_clipped_gradient_of_drawn_labels_makes_the_curvature_smaller() -> None:
    at = begun(0, 1, {})
    norm = stepped(at, 0).metrics["curvature/grad_norm"]
    clipped = hessian_after(1, {"optim__sophia_clip_hessian_grad": norm / 2})
    assert clipped == pytest.approx(sum(hessians(at[2]).values()) / 4, rel=1e-4)
    assert hessian_after(1, {"optim__sophia_clip_hessian_grad": norm * 2}) == sum(
        hessians(at[2]).values()
    )


def test_only_what_it_updates_has_curvature() -> None:
    """With --param-groups, matrices by Sophia-G and the rest by AdamW."""
    groups = {
        "optim__optimizer": "adam", "optim__param_groups": ("kind=matrix:rule=sophiag",),
    }  # fmt: skip
    at = begun(0, 1, groups)
    told = stepped(at, 0).metrics
    assert 0.0 < told["curvature/win_rate"] < 1.0
    matrices = {s.name for s in at[1].parameters if s.tensor.kind == "weight"}
    assert {name.removeprefix("hessian.") for name in hessians(at[2])} == matrices


def test_a_plan_counts_the_pass_and_says_it() -> None:
    config = tiny_config(**SOPHIA | {"optim__sophia_hessian_fraction": 0.5, PP: 2})
    said = describe(draw(config, 2))
    assert "each 3. step, the first included, runs forward and backward once more over 0.5" in said
    assert "observe curvature: 16.7% more of both" in said
    assert said.count("without the passes for curvature") == 2
    asked = PlanInputs.of(config.parallel, config.precision, config.train, config.data, on_gpu=True)
    plain = tiny_config(**{PP: 2})
    ours, adam = (
        forecast(
            draw(c, 2), asked, Cluster(device=find_device("h100"), world_size=2, devices_per_node=8)
        )
        for c in (config, plain)
    )
    assert ours.seconds["curvature"] == pytest.approx(adam.span_seconds * 0.5 / 3)
    rest = {kind: seconds for kind, seconds in ours.seconds.items() if kind != "curvature"}
    assert rest == pytest.approx(dict(adam.seconds))
    assert ours.memory == adam.memory  # two fp32 states each
    assert "curvature" not in adam.seconds and "curvature" not in describe(draw(plain, 2))


def test_an_objective_without_a_vocabulary_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "value", ROWS["value"][0])
    with pytest.raises(ConfigError, match="a head without a vocabulary; use --optimizer adam"):
        draw(tiny_config(**SOPHIA | {"train__objective": "value"}), 1)
    check_config(tiny_config(**SOPHIA), 1)


def test_a_run_goes_on_bit_for_bit(tmp_path) -> None:
    changes = SOPHIA | {"model__num_layers": 1}
    went_on = train_and_save(0, 1, changes, str(tmp_path / "a"), 4, 4)
    resumed = load_and_save_again(0, 1, changes, str(tmp_path / "a"), str(tmp_path / "b"), 4)
    assert resumed == went_on and whole(tmp_path / "a") == whole(tmp_path / "b")
