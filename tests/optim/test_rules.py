"""AdamW and SGD equal their closed formulas, evaluated in float64 with plain Python numbers."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import megatron_lite
from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import OPTIMIZERS, treatment
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.adam import AdamW
from megatron_lite.optim.groups import Groups
from megatron_lite.optim.rules import RULES
from megatron_lite.optim.sgd import SGD

PACKAGE = Path(megatron_lite.__file__).parent
STEPS = 7
LEARNING_RATES = [0.0, 1e-3, 5e-3, 2e-2, 1e-2, 3e-3, 1e-3]  # as a schedule changes them


def drawn(shape=(5, 3), steps=STEPS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(11)

    def draw(scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    # gradients over six orders of magnitude: epsilon counts in the small ones
    return draw(), [draw(10.0 ** -(k % 7)) for k in range(steps)]


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
    """What the engine would hold of a matrix before its first update."""
    spec = Tensor("matrix.weight", tuple(parameter.shape), "weight")
    return Groups(replace(optim, optimizer=name)).new_state(spec, parameter)


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


def test_several_tensors_are_updated_as_if_alone() -> None:
    optim = OptimConfig(sgd_momentum=0.9)
    assert set(RULES) == {"adam", "sgd", "apex-adam"}
    for name in ("adam", "sgd"):  # the third has a file of its own
        rule = RULES[name](optim)
        tensors = [drawn((n, 2))[0] for n in (1, 4, 3)]
        gradients = [drawn((n, 2))[1][0] for n in (1, 4, 3)]
        together = [t.clone() for t in tensors]
        rule.update(
            together, gradients, [zeros(name, t) for t in tensors],
            steps=2, lr=0.1, weight_decay=0.1,
        )  # fmt: skip
        for tensor, gradient, result in zip(tensors, gradients, together, strict=True):
            alone = tensor.clone()
            rule.update([alone], [gradient], [zeros(name, alone)], steps=2, lr=0.1,
                        weight_decay=0.1)  # fmt: skip
            torch.testing.assert_close(result, alone, rtol=1e-14, atol=0)
        rule.update([], [], [], steps=0, lr=0.1, weight_decay=0.1)  # a rank may own nothing


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
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert len(names) == 3 and spelled == {"blueprint", "optim"}


def test_the_flags_reach_the_rules() -> None:
    optim = OptimConfig(adam_beta1=0.8, adam_beta2=0.7, adam_eps=1e-3, sgd_momentum=0.6)
    assert RULES["adam"](optim) == AdamW(beta1=0.8, beta2=0.7, eps=1e-3)
    assert RULES["sgd"](optim) == SGD(momentum=0.6)


@pytest.mark.parametrize("case", ["adam", "adam, bf16 moments", "sgd", "sgd, momentum"])
def test_an_update_that_the_device_does_not_take_changes_no_bit(case: str) -> None:
    momentum = 0.9 if case.endswith("momentum") else 0.0
    rule = RULES[case.split(",")[0]](OptimConfig(sgd_momentum=momentum))
    moments = torch.bfloat16 if "bf16" in case else torch.float32
    values, gradients = drawn(dtype=torch.float32)
    values[0, 0] = -0.0
    names = {"adam": ["exp_avg", "exp_avg_sq"]}.get(
        case.split(",")[0], ["momentum"][: bool(momentum)]
    )
    held = {at: [values.clone(), {n: torch.zeros_like(values, dtype=moments) for n in names}]
            for at in ("waits", "decided", "left out")}  # fmt: skip

    def update(at: str, gradient: torch.Tensor, steps: int, **decided: torch.Tensor) -> None:
        parameter, state = held[at]
        rule.update(
            [parameter], [gradient], [state], steps=steps, lr=1e-2, weight_decay=0.1, **decided
        )

    def bits(at: str) -> list[bytes]:
        parameter, state = held[at]
        tensors = [parameter, *state.values()]
        return [x.view(torch.uint8).numpy().tobytes() for x in tensors]

    yes, no = torch.tensor(True), torch.tensor(False)
    for steps, gradient in enumerate(gradients):
        update("waits", gradient, steps)
        update("decided", gradient, steps, taken=yes)
        update("left out", gradient, steps, taken=yes)
        bad = gradient.clone()
        bad[1, 1], bad[2, 2] = math.nan, math.inf
        update("left out", bad, steps + 1, taken=no)
        assert bits("decided") == bits("waits") == bits("left out")
