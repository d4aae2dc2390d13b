"""Muon equals its polynomial of the singular values in float64, and torch.optim.Muon in bf16."""

from __future__ import annotations

import inspect

import pytest
import torch

from megatron_lite.blueprint.figure.parts import HEAD, Tensor
from megatron_lite.blueprint.optimizers import treatment
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.muon import Muon, coefficients, orthogonal, scale
from tests.support.axes import UNTIED
from tests.support.tiny import draw, tiny_config

SHAPES = [(12, 5), (5, 12), (8, 8)]
KINDS = ("quintic", "simple", "polar_express", "cans", "aol")
RATES = [0.0, 1e-3, 2e-2, 1e-2]


def drawn(shape):
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(len(RATES) + 1)
    ]


def by_singular_values(matrix, steps):
    """Each iteration maps a singular value s to a s + b s^3 + c s^5 and leaves the vectors as they are."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.norm()
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def formula(optim, parameter, gradients, weight_decay):
    mean = torch.zeros_like(parameter)
    steps = coefficients(optim.muon_coefficient_type, optim.muon_num_ns_steps)
    rows, columns = parameter.shape
    size = {
        "spectral": max(rows, columns), "unit_rms_norm": rows / columns,
        "shape_scaling": max(1, rows / columns),
    }[optim.muon_scale_mode] ** 0.5  # fmt: skip
    beta = optim.muon_momentum
    for gradient, lr in zip(gradients, RATES, strict=True):
        mean = beta * mean + (1 - beta) * gradient
        ahead = beta * mean + (1 - beta) * gradient if optim.muon_nesterov else mean
        change = optim.muon_extra_scale_factor * size * by_singular_values(ahead, steps)
        parameter = parameter - lr * (weight_decay * parameter + change)
    return parameter, mean


def run(optim, parameter, gradients, weight_decay=0.1, dtype=torch.float32, rates=RATES):
    values, state = (
        parameter.to(dtype, copy=True),
        {"momentum": torch.zeros(parameter.shape, dtype=dtype)},
    )
    rule = Muon.from_config(optim)
    for step, (gradient, lr) in enumerate(zip(gradients, rates, strict=True)):
        rule.update(
            [values], [gradient.to(dtype)], [state], steps=step, lr=lr, weight_decay=weight_decay
        )
    return values, state["momentum"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "changes",
    [
        *({"muon_coefficient_type": kind} for kind in KINDS),
        {"muon_nesterov": True, "muon_scale_mode": "unit_rms_norm", "muon_momentum": 0.7},
        {"muon_num_ns_steps": 9, "muon_scale_mode": "shape_scaling", "muon_extra_scale_factor": 0.2},
    ],
    ids=str,
)  # fmt: skip
def test_fp32_iterations_are_the_polynomial_in_float64(shape, changes) -> None:
    optim = OptimConfig(**{"muon_fp32_matmul_prec": "highest"} | changes)
    parameter, *gradients = drawn(shape)
    expected, mean = formula(optim, parameter, gradients, 0.1)
    for dtype, within in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        values, momentum = run(optim, parameter, gradients, dtype=dtype)
        # by norm: the first coefficients raise the rounding of the smallest singular values 600 times
        for ours, exact in ((values, expected), (momentum, mean)):
            assert (ours.double() - exact).norm() < within * exact.norm()


SCALES = {
    "original": ("shape_scaling", 1.0),
    "match_rms_adamw": ("spectral", 0.2),
    "spectral_unclamped": ("unit_rms_norm", 1.0),  # torch >= 2.14
}


@pytest.mark.parametrize("theirs", SCALES)
@pytest.mark.parametrize("shape", [(96, 40), (40, 96)])
def test_bf16_iterations_are_torchs(theirs, shape) -> None:
    known = inspect.getsource(inspect.getmodule(torch.optim.Muon.step))
    mode, factor = SCALES[theirs]
    optim = OptimConfig(
        muon_scale_mode=mode, muon_extra_scale_factor=factor, muon_momentum=0.95,
        muon_nesterov=True, muon_coefficient_type="simple",
    )  # fmt: skip
    parameter, *gradients = (x.float() for x in drawn(shape))
    values, _ = run(optim, parameter, gradients)
    reference = torch.nn.Parameter(parameter.clone())
    rate = 1.0
    if theirs not in known:  # its factor, from the name that is there
        theirs, rate = "original", scale(mode, *shape) / scale("shape_scaling", *shape)
    muon = torch.optim.Muon(
        [reference], lr=1.0, weight_decay=0.1 / rate, momentum=0.95, adjust_lr_fn=theirs
    )
    for gradient, lr in zip(gradients, RATES, strict=True):
        muon.param_groups[0]["lr"] = lr * rate
        reference.grad = gradient.clone()
        muon.step()
    moved, expected = values - parameter, reference.detach() - parameter
    assert (moved - expected).norm() < 1e-2 * expected.norm()


def test_an_orthogonal_update_has_singular_values_about_one() -> None:
    """Whatever the gradient's size, and a gradient of nothing changes nothing."""
    for factor in (1e-4, 1.0, 1e4):
        values = orthogonal(
            drawn((30, 20))[0].float() * factor, coefficients("simple", 5), "medium"
        )
        spread = torch.linalg.svdvals(values)
        assert spread.min() > 0.6 and spread.max() < 1.3
    assert orthogonal(torch.zeros(3, 4), coefficients("quintic", 5), "high").abs().max() == 0


def test_scale_modes() -> None:
    assert [scale(m, 16, 4) for m in ("spectral", "unit_rms_norm", "shape_scaling")] == [4, 2, 2]
    assert [scale(m, 4, 16) for m in ("spectral", "unit_rms_norm", "shape_scaling")] == [4, 0.5, 1]


def test_hidden_matrices_are_muons_and_all_else_is_adamws() -> None:
    optim = OptimConfig(optimizer="muon")
    tensors = [p.tensor for p in draw(tiny_config(**{UNTIED: True}), 1).parameters]
    muons = {t.name for t in tensors if treatment(optim, t).rule == "muon"}
    assert {treatment(optim, t).rule for t in tensors if t.name not in muons} == {"adam"}
    names = ("attention.q", "attention.k", "attention.v", "attention.output", "mlp.up", "mlp.down")
    assert muons == {f"blocks.{n}.{name}.weight" for n in range(4) for name in names}
    assert treatment(optim, Tensor(f"{HEAD}.weight", (1, 8), "weight")).rule == "adam"
    assert treatment(optim, Tensor("rotary.up", (4, 8), "weight", stages=True)).rule == "adam"


def test_what_the_device_does_not_take_changes_no_bit() -> None:
    optim = OptimConfig(muon_nesterov=True)
    parameter, *gradients = (x.float() for x in drawn((6, 4)))
    parameter[0, 0] = -0.0
    rule = Muon.from_config(optim)
    held = {k: (parameter.clone(), {"momentum": torch.zeros(6, 4)}) for k in ("waits", "decided")}
    for step, gradient in enumerate(gradients):
        for at, decided in (("waits", {}), ("decided", {"taken": torch.tensor(True)})):
            values, state = held[at]
            rule.update(
                [values], [gradient], [state], steps=step, lr=1e-2, weight_decay=0.1, **decided
            )
        bad = gradient.clone()
        bad[1, 1] = torch.inf
        values, state = held["decided"]
        rule.update(
            [values], [bad], [state], steps=step, lr=1e-2, weight_decay=0.1,
            taken=torch.tensor(False),
        )  # fmt: skip
        for ours, theirs in zip(*(((v, s["momentum"])) for v, s in held.values()), strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
