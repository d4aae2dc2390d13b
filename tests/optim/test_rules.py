"""AdamW, SGD and Lion equal their closed formulas, evaluated in float64 with plain Python numbers."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import megatron_lite
from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import OPTIMIZERS, treatment
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.adam import AdamW
from megatron_lite.optim.rules import RULES
from megatron_lite.optim.sgd import SGD
from tests.optim.updates import (
    LEARNING_RATES,
    STEPS,
    drawn,
    new_state,
    require_each_alone,
    require_left_out,
)

PACKAGE = Path(megatron_lite.__file__).parent


def moments(gradients, beta, power):
    """The bias-corrected moment after each step, as the sum the recursion stands for."""
    found = []
    for t in range(1, len(gradients) + 1):
        weights = [(1 - beta) * beta ** (t - k) for k in range(1, t + 1)]
        total = sum(w * g**power for w, g in zip(weights, gradients[:t], strict=True))
        found.append(total / (1 - beta**t))
    return found


def adamw_formula(parameter, gradients, lrs, *, beta1, beta2, eps, weight_decay):
    """theta_t = theta - lr (m^ / (sqrt(v^) + eps) + wd theta) (arXiv:1711.05101, algorithm 2)."""
    first, second = moments(gradients, beta1, 1), moments(gradients, beta2, 2)
    values = []
    for m, v, lr in zip(first, second, lrs, strict=True):
        parameter = parameter - lr * (m / (v.sqrt() + eps) + weight_decay * parameter)
        values.append(parameter)
    return values


def zeros(name, parameter, optim=OptimConfig()):  # noqa: B008 - it is frozen
    return new_state(replace(optim, optimizer=name), parameter)


def run(rule, parameter, gradients, lrs, weight_decay):
    parameter = parameter.clone()
    name = "adam" if isinstance(rule, AdamW) else "sgd"
    state = zeros(name, parameter, OptimConfig(sgd_momentum=getattr(rule, "momentum", 0.0)))
    values = []
    for step, (gradient, lr) in enumerate(zip(gradients, lrs, strict=True)):
        before = gradient.clone()
        rule.update([parameter], [gradient], [state], steps=step, lr=lr, weight_decay=weight_decay)
        assert torch.equal(gradient, before), "a rule may not touch the gradient"
        values.append(parameter.clone())
    return values, state


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-8), (0.8, 0.95, 1e-2)])
def test_adamw_is_its_formula_at_every_step(beta1, beta2, eps, weight_decay) -> None:
    parameter, gradients = drawn()
    settings = {"beta1": beta1, "beta2": beta2, "eps": eps}
    ours, state = run(AdamW(**settings), parameter, gradients, LEARNING_RATES, weight_decay)
    theirs = adamw_formula(
        parameter, gradients, LEARNING_RATES, weight_decay=weight_decay, **settings
    )
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=lambda m, n=step: f"{n}: {m}")
    # the stored moments are those before the correction
    torch.testing.assert_close(
        state["exp_avg"], moments(gradients, beta1, 1)[-1] * (1 - beta1**STEPS), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        state["exp_avg_sq"], moments(gradients, beta2, 2)[-1] * (1 - beta2**STEPS),
        rtol=1e-12, atol=0,
    )  # fmt: skip


def test_adamw_in_fp32_stays_within_its_rounding() -> None:
    parameter, gradients = drawn(dtype=torch.float32)
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    ours, _ = run(AdamW(**settings), parameter, gradients, LEARNING_RATES, 0.1)
    theirs = adamw_formula(
        parameter.double(), [g.double() for g in gradients], LEARNING_RATES, weight_decay=0.1,
        **settings,
    )  # fmt: skip
    torch.testing.assert_close(ours[-1].double(), theirs[-1], rtol=1e-6, atol=1e-6)


def test_the_first_adamw_step_is_the_learning_rate_whatever_the_gradients_size() -> None:
    rule = AdamW(beta1=0.9, beta2=0.95, eps=0.0)
    parameter = torch.zeros(3, dtype=torch.float64)
    gradient = torch.tensor([1e-6, -1.0, 1e6], dtype=torch.float64)
    state = zeros("adam", parameter)
    rule.update([parameter], [gradient], [state], steps=0, lr=0.25, weight_decay=0.0)
    torch.testing.assert_close(parameter, torch.tensor([-0.25, 0.25, -0.25], dtype=torch.float64))


def test_bias_correction_goes_by_the_steps_done() -> None:
    """A resumed run passes its count: the same moments with another count make another step."""
    parameter, (gradient,) = drawn(steps=1)
    rule = AdamW(beta1=0.9, beta2=0.999, eps=1e-8)
    sizes = {}
    for steps in (0, 9):
        moved, state = parameter.clone(), zeros("adam", parameter)
        rule.update([moved], [gradient], [state], steps=steps, lr=1.0, weight_decay=0.0)
        sizes[steps] = (moved - parameter).abs().mean().item()
    # fresh moments taken for old ones: (1 - b1) / (1 - b1^10) over the root of the same with b2
    expected = (0.1 / (1 - 0.9**10)) / math.sqrt(0.001 / (1 - 0.999**10))
    assert sizes[9] / sizes[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_its_formula_and_torchs_at_every_step(momentum, weight_decay) -> None:
    """The decay is coupled: it goes through the momentum, as in the optimizer that Megatron takes."""
    parameter, gradients = drawn()
    ours, state = run(SGD(momentum), parameter, gradients, LEARNING_RATES, weight_decay)
    assert set(state) == ({"momentum"} if momentum else set())
    theta, buffer = parameter, 0.0
    theirs = torch.nn.Parameter(parameter.clone())
    reference = torch.optim.SGD([theirs], lr=1.0, momentum=momentum, weight_decay=weight_decay)
    for value, gradient, lr in zip(ours, gradients, LEARNING_RATES, strict=True):
        buffer = momentum * buffer + gradient + weight_decay * theta
        theta = theta - lr * buffer
        torch.testing.assert_close(value, theta, rtol=1e-12, atol=1e-14)
        reference.param_groups[0]["lr"] = lr
        theirs.grad = gradient.clone()
        reference.step()
        torch.testing.assert_close(value, theirs.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in RULES if name != "apex-adam"])
def test_several_tensors_are_updated_as_if_alone(name: str) -> None:
    require_each_alone(OptimConfig(optimizer=name))


def test_the_states_of_an_optimizer_are_named_beside_its_rule_alone() -> None:
    """In the table of blueprint/ and in the mathematics that read them."""
    tensor = Tensor("matrix.weight", (4, 4), "weight")
    names = {
        state.name
        for name in OPTIMIZERS
        for state in treatment(OptimConfig(optimizer=name), tensor).states
    }
    spelled = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if "deepspeed" not in path.parts  # its files have words of their own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert len(names) >= 4 and spelled == {"blueprint", "optim"}


def test_the_flags_reach_the_rules() -> None:
    optim = OptimConfig(adam_beta1=0.8, adam_beta2=0.7, adam_eps=1e-3, sgd_momentum=0.6)
    assert RULES["adam"](optim) == AdamW(beta1=0.8, beta2=0.7, eps=1e-3)
    assert RULES["sgd"](optim) == SGD(momentum=0.6)


BF16 = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16"}


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"optimizer": "adam", "exp_avg_sq_dtype": "bf16", **BF16},
        {"optimizer": "sgd", "sgd_momentum": 0.0},
        {"optimizer": "sgd"},
        {"optimizer": "lion"},
        {"optimizer": "lion", **BF16},
        {"optimizer": "sophiag"},
        {"optimizer": "sophiag", **BF16},
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())),
)
def test_an_update_that_the_device_does_not_take_changes_no_bit(settings) -> None:
    require_left_out(OptimConfig(**settings))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_is_its_program_at_every_step(weight_decay) -> None:
    """arXiv:2302.06675, program 1, in numbers of numpy's."""
    parameter, gradients = drawn()
    optim = OptimConfig(optimizer="lion", lion_beta1=0.8, lion_beta2=0.97)
    rule, ours, state = RULES["lion"](optim), parameter.clone(), new_state(optim, parameter)
    theta, m = parameter.numpy().copy(), 0.0
    for step, (gradient, lr) in enumerate(zip(gradients, LEARNING_RATES, strict=True)):
        rule.update([ours], [gradient], [state], steps=step, lr=lr, weight_decay=weight_decay)
        g = gradient.numpy()
        theta = theta - lr * (np.sign(0.8 * m + (1 - 0.8) * g) + weight_decay * theta)
        m = 0.97 * m + (1 - 0.97) * g
        np.testing.assert_allclose(ours.numpy(), theta, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(state["exp_avg"].numpy(), m, rtol=1e-12, atol=1e-15)


def test_tensors_larger_than_a_portion_are_updated_whole() -> None:
    """Cut by rows on the way; with bf16 moments, too."""
    parameter, (gradient,) = drawn((700, 500), 1, torch.float32)
    for narrow in ({}, BF16):
        optim = OptimConfig(optimizer="lion", **narrow)
        ours, state = parameter.clone(), new_state(optim, parameter)
        rule = RULES["lion"](optim)
        rule.update([ours], [gradient], [state], steps=0, lr=1e-2, weight_decay=0.0)
        torch.testing.assert_close(ours, parameter - 1e-2 * gradient.sign())
        torch.testing.assert_close(
            state["exp_avg"].float(), 0.02 * gradient, rtol=2**-7 if narrow else 1e-6, atol=0
        )
