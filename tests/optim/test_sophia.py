"""Sophia-G equals its formula in float64; what it divides by is the Gauss-Newton diagonal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.kernels.random import key
from megatron_lite.kernels.table import TABLE
from megatron_lite.layers.cross_entropy import Scoring
from megatron_lite.layers.drawing import LabelNoise, draw_labels
from megatron_lite.optim.rules import RULES
from megatron_lite.optim.sophia import SophiaG, count_below, observe
from megatron_lite.parallel.context import ParallelContext
from tests.optim.updates import LEARNING_RATES, drawn, new_state

OPTIM = OptimConfig(optimizer="sophiag", sophia_beta1=0.9, sophia_beta2=0.8, sophia_rho=0.04)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_it_is_its_formula_at_every_step(weight_decay) -> None:
    """With B beside h, as the paper's code has it; two steps to an observation."""
    parameter, gradients = drawn()
    _, sampled = drawn((5, 3), 14)
    rule, ours, state = RULES["sophiag"](OPTIM), parameter.clone(), new_state(OPTIM, parameter)
    theta, m, h = parameter.numpy().copy(), 0.0, 0.0
    clipped = []
    for step, (gradient, lr) in enumerate(zip(gradients, LEARNING_RATES, strict=True)):
        if step % 2 == 0:
            tokens, g = 40.0, sampled[7 * (step // 2 % 2)].numpy()
            observe([state["hessian"]], [torch.from_numpy(g)], beta2=0.8, tokens=tokens)
            h = 0.8 * h + (1 - 0.8) * g * g
        rule.update([ours], [gradient], [state], steps=step, lr=lr, weight_decay=weight_decay)
        theta = theta * (1 - lr * weight_decay)
        m = 0.9 * m + (1 - 0.9) * gradient.numpy()
        u = np.minimum(np.abs(m) / (0.04 * tokens * h + 1e-15), 1.0)
        theta = theta - lr * np.sign(m) * u
        np.testing.assert_allclose(ours.numpy(), theta, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(state["exp_avg"].numpy(), m, rtol=1e-11, atol=1e-16)
        np.testing.assert_allclose(state["hessian"].numpy(), tokens * h, rtol=1e-12)
        clipped.append(int((u >= 1.0).sum()))
        below = count_below(state["exp_avg"], state["hessian"], rho=0.04)
        assert int(below) == u.size - clipped[-1]
    assert 0 < sum(clipped) < 7 * 15  # both sides of the clip are met


def test_without_curvature_a_step_is_the_learning_rate() -> None:
    parameter, (gradient,) = drawn(steps=1)
    gradient[0, 0] = 0.0
    state, moved = new_state(OPTIM, parameter), parameter.clone()
    RULES["sophiag"](OPTIM).update([moved], [gradient], [state], steps=0, lr=0.5, weight_decay=0.0)
    torch.testing.assert_close(moved, parameter - 0.5 * gradient.sign())


def test_the_flags_reach_the_rule() -> None:
    assert RULES["sophiag"](OPTIM) == SophiaG(beta1=0.9, rho=0.04)


def test_a_mean_of_observations_is_the_diagonal_of_gauss_newton() -> None:
    """Softmax regression (arXiv:2305.14342, section 2.3): 20,000 draws, every coordinate within 5 %."""
    generator = torch.Generator().manual_seed(1)
    tokens, classes, features, draws = 6, 5, 4, 20_000
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    logits = x @ torch.randn(features, classes, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    # of the mean loss: mean over tokens of (diag(p) - p p^T) x x^T
    exact = torch.einsum("tc,tf->cf", p * (1 - p), x.square()) / tokens
    ops = [TABLE[op][-1].run for op in ("cross_entropy", "cross_entropy_gradients")]
    noise = LabelNoise(torch.tensor(key("labels")), torch.arange(draws * tokens)[:, None])
    labels = draw_labels(
        logits.float().repeat(draws, 1)[:, None], noise,
        Scoring(ParallelContext.serial().tp, classes, *ops),
    ).view(draws, tokens)  # fmt: skip
    hessian = torch.zeros(classes, features, dtype=torch.float64)
    error = p - torch.nn.functional.one_hot(labels, classes)
    gradients = torch.einsum("ntc,tf->ncf", error, x) / tokens
    for n, gradient in enumerate(gradients):
        observe([hessian], [gradient], beta2=n / (n + 1), tokens=tokens)  # a running mean
    torch.testing.assert_close(hessian, exact, rtol=0.05, atol=0)
