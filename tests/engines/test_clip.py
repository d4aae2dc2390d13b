"""The gradient norm and its clipping: the formula in float64, each parameter counted once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_lite.engines.clip import clip_coefficient, count_zeros, global_norm
from megatron_lite.parallel.context import Axis
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import PP, SP, TP, ZERO
from tests.support.engines import counted
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

ALONE, CPU = Axis("none"), torch.device("cpu")


@pytest.mark.parametrize("largest", [1e-3, 1.0, 7.0, 1e4])
def test_the_norm_and_the_coefficient_are_the_formula(largest) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((7, 5), (1,), (3, 2, 2))]
    norm = global_norm(tensors, ALONE, CPU)
    numbers = [float(x) for t in tensors for x in t.flatten()]
    expected = math.sqrt(math.fsum(x * x for x in numbers))
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    coefficient = clip_coefficient(norm, largest).item()
    assert coefficient == pytest.approx(min(1.0, largest / (expected + 1e-6)), rel=1e-6)


def test_the_epsilon_of_clipping_is_megatrons() -> None:
    """It shows where the norm is as small as it."""
    assert clip_coefficient(torch.tensor(3e-6), 1e-6).item() == pytest.approx(0.25, rel=1e-5)
    assert clip_coefficient(torch.tensor(0.0), 1e-6).item() == pytest.approx(1.0, rel=1e-5)
    assert clip_coefficient(torch.tensor(0.0), 1.0).item() == 1.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_value_that_is_not_finite_makes_the_norm_so(value) -> None:
    tensors = [torch.ones(3), torch.tensor([1.0, value])]
    assert not math.isfinite(global_norm(tensors, ALONE, CPU).item())


def test_nothing_has_norm_zero() -> None:
    assert global_norm([], ALONE, CPU).item() == 0.0


def over_ranks(rank, ranks):
    axis = Axis("all", rank, ranks, tuple(range(ranks)), dist.group.WORLD)
    mine = [torch.full((rank + 1,), float(rank))] if rank else []  # rank 0 holds nothing
    mine += [torch.tensor([0.0, 2.0])] if rank == 1 else []
    return global_norm(mine, axis, CPU).item(), count_zeros(mine, axis, CPU).item()


def test_ranks_add_their_squares_and_zeros() -> None:
    # 1 + 1 and 0 + 4 on rank 1, 4 + 4 + 4 on rank 2
    assert spawn(over_ranks, 3) == [(pytest.approx(math.sqrt(18)), 1.0)] * 3


LR = 4096.0
"""So large that a weight after the step is the update, to the last bits of fp32."""


def one_step(rank, ranks, engine, changes, clip):
    """(norm, the gradients before and after clipping that this rank stands for)."""
    changes = changes | {"optim__clip_grad": clip, "optim__optimizer": "sgd"}
    config = tiny_config(**changes, parallel__engine=engine)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    apply, found = run.engine.apply, {}

    def parts(slices):
        pieces = counted(slices, run.ctx)
        return [(p.name, p.offset, p.data.double().numpy().copy()) for p in pieces]

    def keep_and_apply(norm, **rates):
        found["before"] = parts(run.engine.gradients(owned=True))
        return apply(norm, **rates)

    run.engine.apply = keep_and_apply
    start = parts(run.engine.weights(owned=True))
    result = train_step(
        run, make_batches(config, blueprint, run.ctx.dp.rank, 0), lr=LR, weight_decay=0.0
    )
    found["after"] = [
        (name, offset, (values - then) / LR)
        for (name, offset, values), (_, _, then) in zip(
            parts(run.engine.weights(owned=True)), start, strict=True
        )
    ]
    return result.update.grad_norm.item(), found


def squares(results, when):
    """The sum of squares of the global gradient; every box of every tensor must come once."""
    parts = [part for _, found in results for part in found[when]]
    assert len({(name, offset) for name, offset, _ in parts}) == len(parts), "counted twice"
    return sum(float(np.square(values).sum()) for _, _, values in parts), {
        name: sum(v.size for n, _, v in parts if n == name) for name, _, _ in parts
    }


LAYOUTS = {
    "serial": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2 with sequence parallelism": (2, {TP: 2, SP: True}),
    "pp2, tied table on both stages": (2, {PP: 2}),
    "dp2": (2, {}),
    "dp2, sharded": (2, {ZERO: 1}),
    "tp2 x pp2, sharded over dp2": (8, {TP: 2, PP: 2, SP: True, ZERO: 1}),
}


@pytest.fixture(scope="module")
def serial(engine):
    return spawn(one_step, 1, engine, {}, 1e9)


@pytest.mark.parametrize("name", LAYOUTS)
def test_shared_and_replicated_parameters_count_once(serial, engine, name) -> None:
    """Norms and biases on every tp rank, the tied table on two stages, all of it on every dp rank."""
    ranks, changes = LAYOUTS[name]
    total, sizes = squares(serial, "before")
    limit = 0.25 * math.sqrt(total)
    results = spawn(one_step, ranks, engine, changes, limit)
    for norm, _ in results:
        assert norm == pytest.approx(math.sqrt(total), rel=2e-6)
    before, found = squares(results, "before")
    after, _ = squares(results, "after")
    assert found == sizes
    assert before == pytest.approx(total, rel=1e-5)
    coefficient = limit / (math.sqrt(total) + 1e-6)
    assert math.sqrt(after / before) == pytest.approx(coefficient, rel=2e-6)


def test_a_norm_below_the_limit_changes_nothing(serial) -> None:
    total, _ = squares(serial, "before")
    # a difference of fp32 weights over the rate
    assert squares(serial, "after")[0] == pytest.approx(total, rel=1e-6)
    assert serial[0][0] == pytest.approx(math.sqrt(total), rel=1e-6)
