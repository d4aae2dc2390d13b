"""fp16 and bf16: the loss scale leaves no trace in norm or update, and masters keep what is rounded."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.engines import exact_weights, named
from tests.support.tiny import context, draw, make_batches, tiny_config

SMALL = {
    "model__num_layers": 2, "optim__optimizer": "sgd", "optim__sgd_momentum": 0.0,
    "optim__clip_grad": 0.0,
}  # fmt: skip


def made(engine, **changes):
    """(config, blueprint, run) of one rank."""
    config = tiny_config(**SMALL, **changes, parallel__engine=engine)
    blueprint = draw(config, 1)
    return config, blueprint, assemble(config, blueprint, context(blueprint, 0))


def one_step(engine, lr=0.5, steps=1, **changes):
    """(gradient norm, the exact weights after SGD steps by name, loss, run)."""
    config, blueprint, run = made(engine, **changes)
    for step in range(steps):
        batches = make_batches(config, blueprint, 0, step)
        result = train_step(run, batches, lr=lr, weight_decay=0.0)
        assert not result.update.skipped
    masters = {name: weight.clone() for name, weight in exact_weights(run.engine).items()}
    return result.update.grad_norm.item(), masters, result.loss.item(), run


@pytest.fixture(scope="module")
def start(engine):
    return one_step(engine, lr=0.0)[1]


@pytest.fixture(scope="module")
def plain(engine):
    return one_step(engine)


def drifted(masters, reference, start):
    """How far the updates differ: |a - b| over |b - start|, all tensors together."""
    off = sum((masters[n] - reference[n]).double().square().sum() for n in reference)
    moved = sum((reference[n] - start[n]).double().square().sum() for n in reference)
    return math.sqrt(off / moved)


@pytest.mark.parametrize("scale", [1.0, 64.0, 1024.0])
def test_an_fp16_step_is_the_fp32_step_whatever_the_loss_scale(engine, start, plain, scale) -> None:
    norm, masters, loss, _ = one_step(engine, precision__fp16=True, precision__loss_scale=scale)
    # 11 bits in the forward and backward of two layers
    assert loss == pytest.approx(plain[2], rel=2e-3)
    assert norm == pytest.approx(plain[0], rel=2e-2)
    assert drifted(masters, plain[1], start) < 5e-2


def test_a_bf16_step_is_the_fp32_step_to_its_digits(engine, start, plain) -> None:
    norm, masters, loss, run = one_step(engine, precision__bf16=True)
    assert run.engine.loss_scale == 1.0
    assert loss == pytest.approx(plain[2], rel=2e-2)
    assert norm == pytest.approx(plain[0], rel=5e-2)
    assert drifted(masters, plain[1], start) < 1e-1


NORM = "final_norm.weight"


def test_masters_keep_steps_that_bf16_rounds_away(engine) -> None:
    """A step of 2^-12 of a weight is lost in bf16 and must not be lost in sixteen such steps."""
    held = made(engine, precision__bf16=True)[2].engine
    weight, master = named(held.weights(owned=False))[NORM], exact_weights(held)[NORM]
    assert weight.dtype == torch.bfloat16 and master.dtype == torch.float32
    assert torch.equal(weight, torch.ones_like(weight))
    for step in range(1, 17):
        named(held.gradients(owned=False))[NORM].fill_(2.0**-12)
        held.reduce()
        held.apply(torch.tensor(0.0), lr=1.0, weight_decay=0.0)
        weight, master = named(held.weights(owned=False))[NORM], exact_weights(held)[NORM]
        expected = 1.0 - step * 2.0**-12
        assert torch.equal(master, torch.full_like(master, expected))
        assert torch.equal(weight, master.bfloat16())
    # below one, bf16 has steps of 2^-8: sixteen of ours are one of its
    assert torch.equal(weight, torch.full_like(weight, 1.0 - 2.0**-8))


def test_gradients_of_many_micro_batches_are_summed_in_fp32(engine) -> None:
    """1024 equal contributions: a bf16 sum would stop growing at 256 of them."""
    _, _, run = made(engine, precision__bf16=True)
    for parameter, accumulator in run.engine.accumulators():
        assert parameter.dtype == torch.bfloat16 and accumulator.dtype == torch.float32
    local = next(p for p in run.parameters if p.pieces[0].name == NORM)
    for _ in range(1024):
        local.parameter.backward(torch.full_like(local.parameter, 2.0**-10))
    gradient = named(run.engine.gradients(owned=False))[NORM]
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert local.parameter.grad is None, "freed after each contribution"
