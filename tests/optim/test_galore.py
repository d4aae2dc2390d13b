"""GaLore equals AdamW on its projected gradients, in float64; its subspace is the same whoever computes it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import ADAM, state_bytes, treatment
from megatron_lite.config.rules.table import notices
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.galore import GaLore
from megatron_lite.optim.groups import Groups
from tests.support.tiny import draw, tiny_config
from tests.train.runs import alone

KINDS = ("std", "reverse_std", "left", "right")
RATES = [1e-3, 2e-2, 1e-2, 5e-3, 1e-2]
SHAPES = [(12, 6), (6, 12), (7, 7)]


def config(**changes) -> OptimConfig:
    given = {"galore_rank": 3, "galore_update_proj_gap": 2, "adam_beta2": 0.95}
    return OptimConfig(optimizer="galore", **given | changes)


def spec(shape):
    return Tensor("blocks.0.mlp.up.weight", shape, "weight")


def drawn(shape, rank=None):
    """A parameter and gradients, in float64; rank: all within the same space of so many rows and columns."""
    generator = torch.Generator().manual_seed(5)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    if rank is None:
        return normal(*shape), [normal(*shape) for _ in RATES]
    left, right = normal(shape[0], rank), normal(rank, shape[1])
    return normal(*shape), [left @ normal(rank, rank) @ right for _ in RATES]


def run(optim, parameter, gradients, *, dtype=torch.float64, weight_decay=0.1):
    values = parameter.to(dtype, copy=True)
    state = Groups(optim).new_state(spec(tuple(parameter.shape)), values)
    rule = GaLore.from_config(optim)
    for step, (gradient, lr) in enumerate(zip(gradients, RATES, strict=False)):
        rule.update(
            [values], [gradient.to(dtype)], [state], steps=step, lr=lr, weight_decay=weight_decay
        )
    return values, state


def sides(kind, shape):
    tall = shape[0] >= shape[1]
    left = {"std": not tall, "reverse_std": tall, "left": True, "right": False}[kind]
    return left, not left


def formula(optim, parameter, gradients, weight_decay):
    """The paper's algorithm 2 with full square projections, so that nothing has a smaller shape."""
    one, other = sides(optim.galore_proj_type, parameter.shape)
    first = second = 0.0
    for t, (gradient, lr) in enumerate(zip(gradients, RATES, strict=True)):
        if t % optim.galore_update_proj_gap == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=True)
            left = u[:, : optim.galore_rank] if one else torch.eye(len(u), dtype=u.dtype)
            right = vh[: optim.galore_rank].T if other else torch.eye(len(vh), dtype=u.dtype)
            for basis in (left, right):  # largest entry of each vector positive
                basis *= torch.stack([c[c.abs().argmax()].sign() for c in basis.T])
        low = left.T @ gradient @ right
        b1, b2 = optim.adam_beta1, optim.adam_beta2
        first, second = b1 * first + (1 - b1) * low, b2 * second + (1 - b2) * low**2
        root = (second / (1 - b2 ** (t + 1))).sqrt() + optim.adam_eps
        change = optim.galore_scale * left @ (first / (1 - b1 ** (t + 1)) / root) @ right.T
        parameter = parameter - lr * (weight_decay * parameter + change)
    return parameter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula_at_every_turn_of_the_subspace(kind, shape) -> None:
    optim = config(galore_proj_type=kind)
    parameter, gradients = drawn(shape)
    expected = formula(optim, parameter, gradients, 0.1)
    values, state = run(optim, parameter, gradients)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-11)
    left, _ = sides(kind, shape)
    assert set(state) - {"low_exp_avg", "low_exp_avg_sq"} == {
        "left_basis" if left else "right_basis"
    }
    exact, _ = run(optim, parameter, gradients, dtype=torch.float32)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_no_more_than_its_rank_are_adams_in_the_subspace(shape) -> None:
    """torch's AdamW on the coordinates; whichever basis of singular vectors has them."""
    optim = config(galore_scale=1.0, galore_update_proj_gap=100)
    parameter, gradients = drawn(shape, rank=3)
    values, state = run(optim, parameter, gradients, weight_decay=0.0)
    tall = shape[0] >= shape[1]
    _, _, vh = torch.linalg.svd(gradients[0] if tall else gradients[0].T, full_matrices=False)
    basis = vh[:3].T
    for gradient in gradients:  # nothing is lost
        flat = gradient if tall else gradient.T
        torch.testing.assert_close(flat @ basis @ basis.T, flat, rtol=1e-9, atol=1e-11)
    low = torch.nn.Parameter(torch.zeros(max(shape), 3, dtype=torch.float64))
    adam = torch.optim.AdamW([low], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for gradient, lr in zip(gradients, RATES, strict=True):
        adam.param_groups[0]["lr"] = lr
        low.grad = (gradient if tall else gradient.T) @ basis
        adam.step()
    moved = low.detach() @ basis.T
    torch.testing.assert_close(
        values - parameter, moved if tall else moved.T, rtol=1e-9, atol=1e-11
    )


def test_moments_take_the_rank_over_the_smaller_side_of_adams() -> None:
    optim = config(galore_rank=128)
    for shape in ((1024, 4096), (4096, 1024), (2048, 2048)):
        how, adam = treatment(optim, spec(shape)), 2 * 4 * math.prod(shape)
        low = sum(4 * math.prod(s.of(shape)) for s in how.states if s.name.startswith("low"))
        assert low == adam * 128 / min(shape)
        # the basis comes on top: rank over twice the larger side
        assert state_bytes(optim, spec(shape), 1) == low + adam * 128 / (2 * max(shape))


def test_signs_do_not_depend_on_the_librarys_choice() -> None:
    _, (gradient, *_) = drawn((12, 6))
    for side in ("left", "right"):
        optim = config(galore_proj_type=side)
        one, other = (run(optim, gradient, [g])[1][f"{side}_basis"] for g in (gradient, -gradient))
        torch.testing.assert_close(one, other)
        peaks = one.gather(0, one.abs().argmax(0, keepdim=True))
        assert one.shape[1] == 3 and peaks.min() > 0
        torch.testing.assert_close(one.T @ one, torch.eye(3, dtype=one.dtype))


def test_only_hidden_matrices_have_a_subspace() -> None:
    tensors = [p.tensor for p in draw(tiny_config(model__num_layers=1), 1).parameters]
    for tensor in tensors:
        how = treatment(config(), tensor)
        matrix = tensor.name.startswith("blocks.") and tensor.kind == "weight"
        assert how.rule == ("galore" if matrix else "adam")
        assert matrix or how == ADAM


def test_what_the_device_does_not_take_changes_no_bit() -> None:
    optim = config()
    parameter, gradients = drawn((6, 4))
    rule = GaLore.from_config(optim)
    held = []
    for _ in range(2):
        values = parameter.float()
        held.append((values, Groups(optim).new_state(spec((6, 4)), values)))
    for step, gradient in enumerate(gradients):
        given = {"steps": step, "lr": 1e-2, "weight_decay": 0.1}
        rule.update([held[0][0]], [gradient.float()], [held[0][1]], **given)
        bad = gradient.float()
        bad[0, 0], bad[1, 1] = torch.inf, torch.nan
        for values, taken in ((bad, False), (gradient.float(), True)):
            rule.update([held[1][0]], [values], [held[1][1]], taken=torch.tensor(taken), **given)
        for name in ("", *held[0][1]):
            ours, theirs = (state[name] if name else values for values, state in held)
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), name


@pytest.mark.parametrize(("rank", "told"), [(31, False), (32, True)])
def test_a_rank_that_saves_nothing_is_told(rank, told) -> None:
    given = tiny_config(optim__optimizer="galore", optim__galore_rank=rank)
    found = [line for line in notices(given, 1) if line.startswith(f"--galore-rank {rank}")]
    assert len(found) == told


@pytest.mark.ci
def test_a_resume_at_another_rank_is_told(tmp_path) -> None:
    words = ("--mock-data", "--save", str(tmp_path), "--load", str(tmp_path))
    words = (*words, "--optimizer", "galore", "--galore-rank")
    assert alone(*words, "4", "--exit-interval", "2").rc == 0
    again = alone(*words, "8")
    assert again.rc == 4 and "q.weight as [32, 4], and it is [32, 8] here" in again.err
    assert "(--galore-rank), or --no-load-optim" in again.err
    assert alone(*words, "8", "--no-load-optim").rc == 0
