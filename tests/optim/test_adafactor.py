"""Adafactor equals the paper's formula and transformers' class; both its steps, never one for the other."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import state_bytes
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.adafactor import Adafactor
from megatron_lite.optim.groups import Groups
from megatron_lite.optim.shares import TpShare, TpShares
from tests.support.extras import needs

STEPS = 20
GIVEN = {}
PAPER = {"relative_step": True, "scale_parameter": True, "warmup_init": True}
SEMANTICS = {
    "lr as given": (GIVEN, [3e-4 * (1 + k % 3) for k in range(STEPS)]),
    "lr as given, scaled": ({"scale_parameter": True}, [1e-2] * STEPS),
    "relative step": (PAPER, [1.0] * STEPS),
    "relative step without warm-up": (PAPER | {"warmup_init": False}, [1.0] * STEPS),
    "first moment": ({"beta1": 0.9}, [1e-3] * STEPS),
}
SHAPES = ((6, 5), (7,), (3, 8))


def optim(**changes):
    return OptimConfig(
        optimizer="adafactor", **{f"adafactor_{name}": value for name, value in changes.items()}
    )


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    gradients = [
        # over six orders of magnitude, one row of zeros: eps1 and the clipping have their say
        [torch.randn(*shape, generator=generator, dtype=torch.float64) * 10.0 ** -(k % 7)
         for shape in SHAPES]
        for k in range(STEPS)
    ]  # fmt: skip
    for step in gradients:
        step[0][2] = 0.0
    return [v.to(dtype) for v in values], [[g.to(dtype) for g in step] for step in gradients]


def states_of(settings, values):
    groups = Groups(settings)
    return [
        groups.new_state(Tensor(f"{k}.weight", tuple(v.shape), "weight"), v)
        for k, v in enumerate(values)
    ]


def ours(changes, lrs, *, weight_decay=0.0, dtype=torch.float64):
    settings = optim(**changes)
    values, gradients = drawn(dtype)
    rule, states, seen = Adafactor.from_config(settings), states_of(settings, values), []
    for step, (given, lr) in enumerate(zip(gradients, lrs, strict=True)):
        before = [g.clone() for g in given]
        rule.update(values, given, states, steps=step, lr=lr, weight_decay=weight_decay)
        assert all(map(torch.equal, given, before)), "a rule may not touch the gradient"
        seen.append([v.clone() for v in values])
    return seen, states


def formula(changes, lrs, *, weight_decay=0.0):
    """Algorithms 4, 5 and 6 of arXiv:1804.04235, element by element as they are printed."""
    values, gradients = drawn()
    relative, scaled = changes.get("relative_step"), changes.get("scale_parameter")
    beta1 = changes.get("beta1")
    rows, columns, means = {}, {}, [torch.zeros_like(v) for v in values]
    seen = []
    for t, (given, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        beta2 = 1.0 - t**-0.8
        for k, (x, g) in enumerate(zip(values, given, strict=True)):
            square = g**2 + 1e-30
            if x.dim() == 2:
                n, m = x.shape
                r = rows[k] = (
                    beta2 * rows.get(k, 0.0) + (1 - beta2) * square @ torch.ones(m).double() / m
                )
                c = columns[k] = (
                    beta2 * columns.get(k, 0.0) + (1 - beta2) * torch.ones(n).double() @ square / n
                )
                v = torch.outer(r, c) / (r.sum() / n)
            else:
                v = rows[k] = beta2 * rows.get(k, 0.0) + (1 - beta2) * square
            u = g / v**0.5
            u = u / max(1.0, math.sqrt((u**2).mean()))
            rho = lr
            if relative:
                rho = min(1e-6 * t if changes["warmup_init"] else 1e-2, t**-0.5)
            alpha = rho * max(1e-3, math.sqrt((x**2).mean())) if scaled else rho
            if beta1 is not None:
                u = means[k] = beta1 * means[k] + (1 - beta1) * alpha * u
            else:
                u = alpha * u
            values[k] = x - weight_decay * alpha * x - u
        seen.append([v.clone() for v in values])
    return seen


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", SEMANTICS)
def test_it_is_the_papers_formula_at_each_step(name, weight_decay) -> None:
    changes, lrs = SEMANTICS[name]
    seen, _ = ours(changes, lrs, weight_decay=weight_decay)
    single, _ = ours(changes, lrs, weight_decay=weight_decay, dtype=torch.float32)
    expected = formula(changes, lrs, weight_decay=weight_decay)
    for got, narrow, wanted in zip(seen, single, expected, strict=True):
        for a, b, c in zip(got, narrow, wanted, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(b, c.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SEMANTICS)
def test_it_is_transformers_class_at_each_step(name) -> None:
    theirs = needs("transformers.optimization").Adafactor
    changes, lrs = SEMANTICS[name]
    values, gradients = drawn(torch.float32)
    own = [torch.nn.Parameter(v) for v in values]
    settings = {"scale_parameter": False, "relative_step": False} | changes
    given = None if settings["relative_step"] else lrs[0]
    optimizer = theirs(own, lr=given, weight_decay=0.1, **settings)
    seen, _ = ours(changes, lrs, weight_decay=0.1, dtype=torch.float32)
    for step, lr, wanted in zip(gradients, lrs, seen, strict=True):
        for group in optimizer.param_groups if given else ():
            group["lr"] = lr
        for parameter, gradient in zip(own, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for a, b in zip(own, wanted, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-6, atol=1e-6)


def test_torchs_own_adafactor_is_another_step() -> None:
    """Of equal settings: its lr is scaled by the weights' size, which nothing switches off."""
    lr, size = 3e-4, 0.02
    steps = {}
    for name in ("ours", "torch"):
        value, gradient = torch.full((8, 8), size), torch.ones(8, 8)
        if name == "torch":
            parameter = torch.nn.Parameter(value.clone())
            parameter.grad = gradient
            torch.optim.Adafactor([parameter], lr=lr).step()
            steps[name] = (value - parameter.detach()).mean().item()
        else:
            before, states = value.clone(), states_of(optim(), [value])
            Adafactor.from_config(optim()).update(
                [value], [gradient], states, steps=0, lr=lr, weight_decay=0.0
            )
            steps[name] = (before - value).mean().item()
    assert steps["ours"] == pytest.approx(lr, rel=1e-3)
    assert steps["ours"] / steps["torch"] == pytest.approx(1 / size, rel=1e-3)


def test_a_second_moment_of_rank_one_is_kept_exactly() -> None:
    row, column = torch.rand(6, dtype=torch.float64) + 0.5, torch.rand(4, dtype=torch.float64) + 0.5
    gradient = torch.outer(row, column)
    value = torch.zeros(6, 4, dtype=torch.float64)
    (state,) = states_of(optim(), [value])
    Adafactor.from_config(optim()).update(
        [value], [gradient], [state], steps=0, lr=1.0, weight_decay=0.0
    )
    second = torch.outer(state["exp_avg_sq_row"], state["exp_avg_sq_col"])
    torch.testing.assert_close(second / state["exp_avg_sq_row"].mean(), gradient**2)
    torch.testing.assert_close(value, -torch.ones_like(value))


def test_its_states_are_below_a_hundredth_of_the_parameters() -> None:
    matrix = Tensor("a.weight", (1024, 1024), "weight")
    assert state_bytes(optim(), matrix, 1) == 4 * 2048 < 0.01 * 4 * 1024**2
    assert state_bytes(optim(beta1=0.9), matrix, 1) == 4 * (2048 + 1024**2)


def test_what_is_not_taken_keeps_its_bits() -> None:
    settings = optim(scale_parameter=True, beta1=0.9)
    for verdict in (True, False):
        results = []
        for taken in (None, torch.tensor(verdict)):
            values, gradients = drawn(torch.float32)
            states = states_of(settings, values)
            Adafactor.from_config(settings).update(
                values, [g * (math.inf if verdict is False else 1) for g in gradients[0]], states,
                steps=3, lr=0.1, weight_decay=0.1, taken=taken,
            )  # fmt: skip
            results.append([*values, *(t for state in states for t in state.values())])
        if not verdict:
            values, _ = drawn(torch.float32)
            results[0] = [
                *values,
                *(t for state in states_of(settings, values) for t in state.values()),
            ]
        assert all(map(torch.equal, *results))


def piece(tensor, cut, rank):
    """A vector is cut along its only dim; the last of three ranks has nothing."""
    dim = min(cut, tensor.dim() - 1)
    return tensor.split((2, tensor.shape[dim] - 2, 0), dim)[rank]


def together(update, ranks, calls):
    """update(rank, total) of as many ranks, each in a thread; total waits for all of them."""
    meeting, handed = threading.Barrier(ranks, timeout=30), [[] for _ in range(ranks)]

    def total_of(rank):
        def total(tensors):
            handed[rank] = [tensor.clone() for tensor in tensors]
            meeting.wait()
            for k, tensor in enumerate(tensors):
                tensor.copy_(sum(given[k] for given in handed))
            meeting.wait()
            if rank == 0:
                calls.append(len(tensors))

        return total

    with ThreadPoolExecutor(ranks) as pool:
        for done in [pool.submit(update, rank, total_of(rank)) for rank in range(ranks)]:
            done.result()


@pytest.mark.parametrize("name", ["lr as given", "relative step", "first moment"])
@pytest.mark.parametrize("cut", [0, 1])
def test_parts_of_a_tensor_are_updated_as_the_whole(name, cut) -> None:
    """Three ranks in lockstep, the last of them without a row: two sums for all members."""
    changes, lrs = SEMANTICS[name]
    whole, _ = ours(changes, lrs, weight_decay=0.1)
    settings = optim(**changes)
    values, gradients = drawn()
    held = [[piece(v, cut, rank).clone() for v in values] for rank in range(3)]
    states = [states_of(settings, mine) for mine in held]
    dims = [min(cut, v.dim() - 1) for v in values]
    shares = [TpShare(tuple(v.shape), dim) for v, dim in zip(values, dims, strict=True)]
    rule, calls = Adafactor.from_config(settings), []
    for step, (given, lr) in enumerate(zip(gradients, lrs, strict=True)):

        def update(rank, total, given=given, step=step, lr=lr):
            mine = [piece(g, cut, rank) for g in given]
            rule.update(
                held[rank], mine, states[rank],
                steps=step, lr=lr, weight_decay=0.1, shares=TpShares(shares, total),
            )  # fmt: skip

        together(update, 3, calls)
        for k, v in enumerate(whole[step]):
            for rank, mine in enumerate(held):
                torch.testing.assert_close(mine[k], piece(v, cut, rank), rtol=1e-12, atol=1e-14)
    assert len(calls) == 2 * STEPS
