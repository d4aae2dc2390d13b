"""A matrix stored in another number format than it computes in: up-projections kept as fp16 in an fp32 run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Matrix, Parts
from megatron_lite.blueprint.parameters import table_of
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Store
from megatron_lite.planner.memory import PlanInputs, memory
from megatron_lite.rehearsal.rehearse import stand_in
from megatron_lite.train.assemble import assemble
from megatron_lite.train.health.state_hash import state_hash
from megatron_lite.train.resume import fill_run
from megatron_lite.train.step import train_step
from tests.support.axes import ZERO
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

UP = "mlp.up.weight"
SMALL = {"model__num_layers": 2, "model__vocab_size": 64, "train__global_batch_size": 4}


def stored(blueprint, storage):
    """The same plan of a model whose up-projections are stored so."""

    def layer(parts):
        return Parts(tuple(
            dataclasses.replace(part, storage=storage)
            if isinstance(part, Matrix) and part.name == "mlp.up" else part
            for part in parts.parts
        ))  # fmt: skip

    figure = dataclasses.replace(
        blueprint.figure, layers=tuple(layer(parts) for parts in blueprint.figure.layers)
    )
    table = table_of(figure, blueprint.stages)
    return dataclasses.replace(blueprint, figure=figure, parameters=table)


def made(rank=0, ranks=1, storage="fp16", **changes):
    config = tiny_config(**SMALL | changes)
    blueprint = stored(draw(config, ranks), storage)
    return config, blueprint, assemble(config, blueprint, context(blueprint, rank))


def trained(run, config, blueprint, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step)
        result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
        losses.append(result.loss.item())
    return losses


def test_it_computes_as_fp32_weights_that_are_rounded_before_each_step() -> None:
    """Bit by bit: the reference rounds by hand, and gives the optimizer the exact values back."""
    config, blueprint, run = made()
    _, plain, reference = made(storage=None)
    up = [p for p in reference.parameters if p.pieces[0].name.endswith(UP)]
    exact = [local.parameter.detach().clone() for local in up]
    # what is stored is the start of both
    exact = [values.half().float() for values in exact]
    apply = reference.engine.apply

    def with_exact(norm, **rates):
        for local, values in zip(up, exact, strict=True):
            local.parameter.detach().copy_(values)
        update = apply(norm, **rates)
        for local, values in zip(up, exact, strict=True):
            values.copy_(local.parameter.detach())
            local.parameter.detach().copy_(values.half().float())
        return update

    reference.engine.apply = with_exact
    for local, values in zip(up, exact, strict=True):
        local.parameter.detach().copy_(values)
    assert trained(run, config, blueprint, 3) == trained(reference, config, plain, 3)
    ours = {s.name: s.data for s in run.engine.weights(owned=True)}
    theirs = {s.name: s.data for s in reference.engine.weights(owned=True)}
    for name, values in ours.items():
        assert values.dtype == (torch.float16 if name.endswith(UP) else torch.float32)
        assert torch.equal(values.float(), theirs[name]), name
    masters = {s.name: s.data for s in run.engine.state(owned=True) if "master." in s.name}
    assert len(masters) == 2
    assert all(torch.equal(a, b) for a, b in zip(masters.values(), exact, strict=True)), (
        "masters are exact"
    )


def test_a_checkpoint_of_it_resumes_bit_for_bit_and_loads_into_a_plain_run(tmp_path) -> None:
    config, blueprint, run = made()
    trained(run, config, blueprint, 2)
    store, progress = Store(tmp_path, run.ctx), Progress(2, 8, lr_samples=8, optimizer_steps=2)
    store.save(
        store.snapshot(
            2, weights=run.engine.weights(owned=True), optimizer=run.engine.state(owned=True),
            progress=progress,
        )
    )  # fmt: skip
    manifest, _ = store.newest_intact()
    kept = {name: t.dtype for name, t in manifest.tensors.items() if name.endswith(UP)}
    assert kept[f"blocks.0.{UP}"] == "F16" and kept[f"master.blocks.0.{UP}"] == "F32"
    again = made()[2]
    fill_run(again, store, manifest, optimizer=True)
    assert state_hash(again) == state_hash(run)
    plain = made(storage=None)[2]
    fill_run(plain, store, manifest, optimizer=True)
    exact = {s.name: s.data for s in run.engine.state(owned=True)}
    (found,) = [s.data for s in plain.engine.weights(owned=True) if s.name == f"blocks.0.{UP}"]
    assert torch.equal(found, exact[f"master.blocks.0.{UP}"])
    assert trained(again, config, blueprint, 2, 2) == trained(run, config, blueprint, 2, 2)


def test_the_plan_counts_what_is_stored() -> None:
    config = tiny_config(**SMALL)
    blueprint = stored(draw(config, 1), "fp16")
    asked = PlanInputs(
        config.parallel, config.precision, config.train.micro_batch_size, on_gpu=False
    )
    (planned,) = memory(blueprint, asked)
    with stand_in(config, blueprint, 0) as actor:
        measured = actor.perform().memory.kinds()
    for kind in ("weights", "gradients", "masters", "moments"):
        assert planned.kinds[kind] == pytest.approx(measured[kind], rel=2e-3), kind
    up = 2 * 128 * 32
    assert planned.kinds["masters"] == 4 * up
    (plain,) = memory(draw(config, 1), asked)
    assert plain.kinds["weights"] - planned.kinds["weights"] == 2 * up


def shared(rank, ranks, changes):
    config, blueprint, run = made(rank, ranks, **changes)
    return trained(run, config, blueprint, 3), state_hash(run)


@pytest.mark.ci
def test_two_ranks_that_share_the_state_train_it_alike() -> None:
    """Buckets of one number format each, gathered in it."""
    ((alone, _),) = spawn(shared, 1, {})
    zero = {ZERO: 1, "parallel__ddp_bucket_size": 3000}
    results = spawn(shared, 2, zero)
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(alone, rel=1e-6)
