"""ZeRO's stages share memory and change no number."""

from __future__ import annotations

from functools import partial

import pytest

from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import evaluation_step, train_step
from tests.parity.layouts import SELECTIVE, recompute
from tests.support.axes import BF16, CHUNKS, HOST, PP, SCHEDULE, SP, TP, UNTIED, ZERO
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config


def trained(rank, ranks, stage, changes, steps):
    """Losses, gradient norms and an evaluation's loss over some steps."""
    always = {"model__hidden_dropout": 0.1, "train__global_batch_size": 8}
    config = tiny_config(**always | {"parallel__ddp_bucket_size": 1500} | changes | {ZERO: stage})
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    seen = []
    for step in range(steps):
        run.progress.step = step
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
        result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
        seen += [result.loss.item(), result.update.grad_norm.item()]
        seen += evaluation_step(run, batches).tolist()
    return seen


def by_stages(rank, ranks, changes, stages, steps):
    """Of each stage."""
    return [trained(rank, ranks, stage, changes, steps) for stage in stages]


SOPHIA = {"optim__optimizer": "sophiag", "optim__sophia_hessian_interval": 2}
LISA = {"optim__lisa_layers": 1, "optim__lisa_interval": 1}
LAYOUTS = {
    "dp2": (2, {}),
    "dp2 untied recomputed": (2, {UNTIED: True, **recompute("full", "uniform", 2)}),
    "dp2 tp2 sp": (4, {TP: 2, SP: True}),
    "dp2 pp2 zb-v": (4, {PP: 2, SCHEDULE: "zb-v"}),
    "dp2 pp2 1f1b": (4, {PP: 2}),
    "dp2 pp2 interleaved": (4, {PP: 2, CHUNKS: 2, **recompute("full", "uniform", 1)}),
    "dp2 pp2 zb-h1 tp2": (8, {PP: 2, TP: 2, SP: True, SCHEDULE: "zb-h1"}),
    "dp2 fp16": (2, {"precision__fp16": True, "precision__initial_loss_scale": 1024.0}),
    "dp2 bf16 autograd": (2, {BF16: True, "precision__gradient_accumulation_fusion": False}),
    "dp2 not overlapped": (2, {**SELECTIVE, "parallel__overlap_grad_reduce": False}),
    "dp3 16-bit sums": (3, {BF16: True, "parallel__accumulate_allreduce_grads_in_fp32": False,
                            "train__global_batch_size": 12}),
    "dp2 tp2 muon": (4, {TP: 2, "optim__optimizer": "muon", "optim__muon_fp32_matmul_prec": "highest"}),
    "dp2 tp2 galore": (4, {TP: 2, "optim__optimizer": "galore", "optim__galore_rank": 5}),
    "dp2 adafactor": (2, {"optim__optimizer": "adafactor"}),
    "dp2 sophia": (2, SOPHIA),
    "dp2 lisa": (2, LISA),
    "dp2 pp2 lisa": (4, {PP: 2, **LISA}),
    "dp2 host": (2, {HOST: True}),
    "dp2 lora": (2, {"lora__lora_rank": 2}),
    "dp2 lora of all": (2, {"lora__lora_rank": 2, "lora__lora_targets": ["all"], UNTIED: True}),
    "dp2 late gradients": (2, {"model__position_embedding_type": "rope", "model__rope_scaling_type": "clex",
                               "model__rope_scaling_factor": 4.0}),
}  # fmt: skip
SOON, CI = ("dp2",), ("dp2 tp2 sp", "dp2 pp2 zb-v")
CLOSE = {
    "dp2 fp16": 1e-2,
    "dp2 lora of all": 1e-5,
    "dp2 bf16 autograd": 1e-2,
    "dp3 16-bit sums": 1e-2,
}
"""How close losses and norms are where sums in another order are rounded to 16 bits, or small; else 1e-6."""
STEPS = {"dp2": 2, "dp2 late gradients": 2}
"""Fewer where it must be quick, or where an equation is solved that a rounding error grows in."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in SOON else pytest.mark.ci if n in CI else pytest.mark.slow)
        for n in LAYOUTS
    ],
)
def test_stages_train_alike(name) -> None:
    ranks, changes = LAYOUTS[name]
    for first, *others in spawn(by_stages, ranks, changes, (0, 1, 2, 3), STEPS.get(name, 3)):
        for other in others:
            assert other == pytest.approx(first, rel=CLOSE.get(name, 1e-6))


def memory_of_gradients(rank, ranks, changes):
    """(bytes of accumulators when a layer's backward begins or ends, most and least; of all together)."""
    config = tiny_config(**{ZERO: 2, "parallel__ddp_bucket_size": 1500} | changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    seen = []

    def count():
        storages = {g.untyped_storage().data_ptr(): g for _, g in run.engine.accumulators()}
        seen.append(sum(g.untyped_storage().nbytes() for g in storages.values()))

    count()
    for stage in run.pipeline.stages.values():
        for block in stage.module.blocks.values():
            block.register_full_backward_hook(lambda *_: count())
    run.pipeline.reached = lambda *_: count()
    batches = make_batches(config, blueprint, run.ctx.dp.rank, 0)
    train_step(run, batches, lr=1e-2, weight_decay=0.1)
    count()
    own = sum(piece.data.nbytes for piece in run.engine.gradients(owned=False))
    return seen, own, sum(4 * local.parameter.numel() for local in run.parameters)


def test_gradients_have_memory_from_a_layers_backward_to_their_reduction_alone() -> None:
    for seen, own, all_together in spawn(memory_of_gradients, 2, {}):
        assert seen[0] == seen[-1] == 0 and 0 < max(seen) < 0.6 * all_together
        assert seen.count(0) > 4, "between micro batches there is none"
        assert own == pytest.approx(all_together / 2, rel=0.05)


@pytest.mark.slow
def test_in_a_pipeline_gradients_stay_until_the_last_backward() -> None:
    for seen, own, all_together in spawn(memory_of_gradients, 4, {PP: 2}):
        assert seen[0] == seen[-1] == 0 and max(seen) == pytest.approx(all_together, rel=0.05)
        assert own == pytest.approx(all_together / 2, rel=0.05)


def memory_of_weights(rank, ranks, changes):
    """Bytes of weights between passes, between a pass' actions, while blocks run; of all, and of shards."""
    config = tiny_config(**{ZERO: 3, BF16: True} | changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    outside, between, within = [], [], []

    def count(seen):
        seen.append(sum(p.parameter.untyped_storage().nbytes() for p in run.parameters))

    count(outside)
    for stage in run.pipeline.stages.values():
        for block in stage.module.blocks.values():
            block.register_forward_hook(lambda *_: count(within))
            block.register_full_backward_hook(lambda *_: count(within))
    run.pipeline.reached = lambda *_: count(between)
    for step in range(2):
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step)
        for go in (partial(train_step, lr=1e-2, weight_decay=0.1), evaluation_step):
            go(run, batches)
            count(outside)
    own = sum(piece.data.nbytes for piece in run.engine.weights(owned=False))
    return (
        outside,
        between,
        within,
        sum(2 * local.parameter.numel() for local in run.parameters),
        own,
    )


@pytest.mark.parametrize(
    "recomputed",
    [
        pytest.param({}, id="kept"),
        pytest.param(recompute("full", "uniform", 2), id="again", marks=pytest.mark.ci),
    ],
)
def test_weights_have_memory_around_their_layers_alone(recomputed) -> None:
    for outside, between, within, whole, own in spawn(memory_of_weights, 2, recomputed):
        assert set(outside) == {0}
        assert max(between) < 0.3 * whole, (
            "of the layer that comes again next: the head, the first block"
        )
        assert 0 < max(within) < 0.6 * whole, "a block of four, and the ends of the model"
        assert own == pytest.approx(whole / 2, rel=0.05)
