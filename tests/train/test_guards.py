"""Bad numbers: seen by all ranks in the same step, named alike, and stopped, skipped or healed."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.config.sections.guards import GuardsConfig
from megatron_lite.engines.loss_scale import LossScale
from megatron_lite.train.assemble import assemble
from megatron_lite.train.health.guards import Act, StepNumbers, guards_for
from megatron_lite.train.step import train_step
from tests.support.axes import PP, SCHEDULE, SP, TP, ZERO
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

SKIP = {"guards__on_non_finite": "skip"}


def spoil_weight(run) -> None:
    for piece in run.engine.weights(owned=False):
        if piece.name == "blocks.2.mlp.up.weight":
            piece.data.view(-1)[3] = float("inf")


def spoil_output(run) -> None:
    for stage in run.pipeline.stages.values():
        if "1" in stage.module.blocks:
            stage.module.blocks["1"].attention.qkv.register_forward_hook(
                lambda module, inputs, output: output * float("nan")
            )


def spoil_sum(run) -> None:
    """The first of a norm's two results: what was added before it."""
    (stage,) = run.pipeline.stages.values()
    stage.module.blocks["1"].mlp_norm.register_forward_hook(
        lambda module, inputs, output: (output[0] * float("nan"), output[1])
    )


def spoil_output_once(run) -> None:
    tries = iter([float("nan")])
    (stage,) = run.pipeline.stages.values()
    stage.module.final_norm.register_forward_hook(
        lambda module, inputs, output: output * next(tries, 1.0)
    )


def spoil_gradient(run) -> None:
    for stage in run.pipeline.stages.values():
        if "1" in stage.module.blocks:
            stage.module.blocks["1"].mlp.register_full_backward_hook(
                lambda module, dx, dy: (dx[0] * float("inf"), *dx[1:])
            )


def spoil_copy_after_the_sum(run) -> None:
    """One dp rank's copy of a gradient breaks after the reduction: no sum carries it to the others."""
    reduce, tries = run.engine.reduce, iter([True])

    def then_break():
        reduce()
        if next(tries, False):
            run.engine.accumulators()[4][1].view(-1)[0] = float("nan")

    run.engine.reduce = then_break


SPOILS = {
    "weight": spoil_weight, "output": spoil_output, "gradient": spoil_gradient,
    "sum": spoil_sum, "output once": spoil_output_once, "copy": spoil_copy_after_the_sum,
}  # fmt: skip


def bits(run):
    """All weights and optimizer tensors of this rank."""
    tensors = [*run.engine.weights(owned=False), *run.engine.state(owned=False)]
    return [piece.data.clone() for piece in tensors]


def two_steps(rank, ranks, changes, spoil, spoiled_rank):
    """(stop, warnings, skipped, state as before the second step, loss) of the second step, spoiled."""
    config = tiny_config(**changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    train_step(run, make_batches(config, blueprint, run.ctx.dp.rank, 0), lr=1e-2, weight_decay=0.1)
    run.progress.step = 1
    if rank == spoiled_rank:
        SPOILS[spoil](run)
    before = bits(run)
    result = train_step(
        run, make_batches(config, blueprint, run.ctx.dp.rank, 1), lr=1e-2, weight_decay=0.1
    )
    same = all(torch.equal(a, b) for a, b in zip(before, bits(run), strict=True))
    return result.stop, result.warnings, result.update.skipped, same, result.loss.item()


CASES = {
    "a norm's sum": (1, {}, "sum", 0,
                     "the output of blocks.1.mlp_norm on rank 0 for samples 8, 9 is the first"),
    "a weight, tp2": (2, {TP: 2}, "weight", 1,
                      "the weight blocks.2.mlp.up.weight on rank 1 itself is not finite"),
    "an output, tp2": (2, {TP: 2}, "output", 1,
                       "the output of blocks.1.attention.qkv on rank 1 for samples 8, 9 is the first"),
    "an output, pp2": (2, {PP: 2}, "output", 0,
                       "the output of blocks.1.attention.qkv on rank 0 for samples 8, 9 is the first"),
    "an output, tp2 pp2, sequence parallel": (
        4, {TP: 2, PP: 2, SP: True}, "output", 1,
        "the output of blocks.1.attention.qkv on rank 1 for samples 8, 9 is the first",
    ),
    "a gradient, pp2 dp2": (4, {PP: 2}, "gradient", 1,
                            "the gradient of blocks.1.mlp_norm.bias on rank 1, from samples "),
    "an output, interleaved": (
        2, {PP: 2, "parallel__num_layers_per_virtual_pipeline_stage": 1,
            SCHEDULE: "interleaved"}, "output", 1,
        "the output of blocks.1.attention.qkv on rank 1 for samples 8, 9 is the first",
    ),
    "an output, recomputed": (1, {"parallel__recompute_granularity": "full",
                                  "parallel__recompute_method": "uniform",
                                  "parallel__recompute_num_layers": 2}, "output", 0,
                              "the output of blocks.1.attention.qkv on rank 0 for samples 8, 9 is"),
    "a gradient, distributed optimizer": (
        2, {ZERO: 1, "parallel__overlap_grad_reduce": True}, "gradient", 1,
        "the gradient of blocks.1.mlp_norm.bias on rank 1, from samples ",
    ),
    "a gradient, stage 2": (2, {ZERO: 2}, "gradient", 1,
                            "the gradient of blocks.1.mlp_norm.bias on rank 1, from samples "),
    "an output, stage 3": (2, {ZERO: 3}, "output", 1,
                           "the output of blocks.1.attention.qkv on rank 1 for samples "),
    "a weight, stage 3": (2, {ZERO: 3}, "weight", 1,
                          "the weight blocks.2.mlp.up.weight on rank 1 itself is not finite"),
    "a gradient, stage 3, pp2": (4, {ZERO: 3, PP: 2}, "gradient", 1,
                                 "the gradient of blocks.1.mlp_norm.bias on rank 1, from samples "),
    "a gradient, zero bubble": (2, {PP: 2, SCHEDULE: "zb-h1"}, "gradient", 0,
                                "the gradient of blocks.1.mlp_norm.bias on rank 0, from samples "),
}  # fmt: skip


EVERY_TIME = (
    "a norm's sum",
    "a weight, tp2",
    "an output, pp2",
    "a gradient, pp2 dp2",
    "an output, recomputed",
)
NAMES = [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.ci) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_name_the_first_bad_value_in_the_same_step(name) -> None:
    ranks, layout, spoil, at, words = CASES[name]
    results = spawn(two_steps, ranks, layout, spoil, at)
    stops = {result[0] for result in results}
    assert len(stops) == 1, stops
    (stop,) = stops
    assert stop.startswith("iteration 2: the loss is ") and words in stop, stop
    assert "it is the same: the data or the code" in stop
    assert all(skipped and same for _, _, skipped, same, _ in results)


@pytest.mark.parametrize("name", ["an output, pp2", "a gradient, distributed optimizer"])
def test_skip_leaves_weights_and_moments_and_says_why(name) -> None:
    ranks, layout, spoil, at, words = CASES[name]
    for stop, warnings, skipped, same, _ in spawn(two_steps, ranks, layout | SKIP, spoil, at):
        assert stop is None and skipped and same
        (warning,) = warnings
        assert words in warning


def test_a_copy_that_breaks_on_one_rank_is_seen_by_the_others() -> None:
    first, second = spawn(two_steps, 2, {}, "copy", 1)
    assert first[0] == second[0] and "(1 ranks hold such gradients)" in first[0]
    assert "a passing fault of the machine" in first[0]


def test_a_passing_fault_is_told_from_a_bug_and_its_step_is_not_lost() -> None:
    clean = spawn(two_steps, 2, {}, "copy", -1)
    stopped = spawn(two_steps, 2, {}, "output once", 1)
    healed = spawn(two_steps, 2, SKIP, "output once", 1)
    for stop, _, skipped, same, _ in stopped:
        assert "the loss of samples 10, 11 on rank 1 was nan and then 4." in stop, stop
        assert "a passing fault of the machine" in stop and skipped and same
    for (stop, warnings, skipped, same, loss), expected in zip(healed, clean, strict=True):
        assert stop is None and not skipped and not same and loss == expected[4]
        assert "the second result is taken" in warnings[0]


def test_without_replay_the_parameter_and_the_ranks_of_the_sum_are_named() -> None:
    changes = {"guards__rerun_mode": "disabled"}
    for stop, *_ in spawn(two_steps, 2, changes, "gradient", 1):
        assert "the gradient of blocks.1.mlp_norm.bias, summed over ranks 0, 1" in stop


def test_the_check_can_be_switched_off() -> None:
    changes = {"guards__check_for_nan_in_loss_and_grad": False}
    ((stop, warnings, skipped, same, _),) = spawn(two_steps, 1, changes, "output", 0)
    assert (stop, warnings, skipped, same) == (None, (), False, False)


# --- spikes


def judged(values, **changes):
    """The acts of a gradient-norm guard over a curve, and the last verdict."""
    config = GuardsConfig(spike_window=4, grad_norm_spike_factor=3.0, **changes)
    guards = guards_for(config, LossScale(1.0, False, 1.0, 1, 1, 1), fp16=False)
    progress, acts = Progress(), []
    for value in values:
        seen = StepNumbers(2.0, value, 0)
        verdict = guards.judge(seen, progress)
        guards.note(seen, progress)
        acts.append(verdict.act)
        progress = Progress.from_json(progress.to_json())  # as a resume after every step
    return acts, verdict


def test_a_spike_is_held_against_the_median_of_a_full_window() -> None:
    go, warn = Act.GO_ON, Act.WARN
    acts, _ = judged([50.0, 1.0, 2.0, 1.0, 4.4, 4.6, 1.0, 9.0])
    # medians: 1.5 of (50, 1, 2, 1), 1.5 of (1, 2, 1, 4.4), 3.2 of (2, 1, 4.4, 4.6), 2.7 of the last
    assert acts == [go, go, go, go, go, warn, go, warn]


def test_a_change_that_lasts_becomes_normal() -> None:
    acts, _ = judged([1.0] * 4 + [10.0] * 4)
    assert acts[4:] == [Act.WARN, Act.WARN, Act.GO_ON, Act.GO_ON]


def test_a_spike_says_its_size_and_can_be_skipped_or_fatal() -> None:
    for policy, act in (("warn", Act.WARN), ("skip", Act.SKIP), ("stop", Act.STOP)):
        acts, verdict = judged([1.0] * 4 + [100.0], on_spike=policy)
        assert acts[-1] is act
        assert "gradient norm of 100 is 100 times the median 1 of the last 4 steps" in verdict.what


def test_what_is_not_finite_never_enters_the_window() -> None:
    acts, _ = judged([1.0] * 4 + [float("nan"), float("inf"), 2.0])
    assert acts[4:] == [Act.STOP, Act.STOP, Act.GO_ON]


def test_the_median_is_pythons() -> None:
    import statistics

    values = torch.rand(50, generator=torch.Generator().manual_seed(5)).mul(6).tolist()
    acts, _ = judged(values)
    for n in range(4, 50):
        expected = values[n] > 3.0 * statistics.median(values[n - 4 : n])
        assert (acts[n] is Act.WARN) == expected, n


def test_the_step_after_one_that_ran_again_tells_its_own_loss() -> None:
    losses = []
    for spoil in (spoil_output_once, lambda run: None):
        config = tiny_config(**SKIP)
        blueprint = draw(config, 1)
        run = assemble(config, blueprint, context(blueprint, 0))
        spoil(run)
        for step in range(2):
            run.progress.step = step
            batches = make_batches(config, blueprint, 0, step)
            result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
        losses.append(result.loss.item())
    assert losses[0] == losses[1]
