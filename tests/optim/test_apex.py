"""--optimizer apex-adam: apex's kernel behind a stand-in of its package is our AdamW, states and all."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.apex import ApexAdamW
from megatron_lite.optim.rules import RULES
from megatron_lite.rehearsal.rehearse import stand_in
from tests.support.checkpoints import assembled, load_and_save_again, train, train_and_save, whole
from tests.support.tiny import draw, tiny_config

APEX = {"optim__optimizer": "apex-adam", "model__num_layers": 1}
ADAM = APEX | {"optim__optimizer": "adam"}


def multi_tensor_adam_capturable(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: Tensor, beta1: float, beta2: float,
    eps: float, step: Tensor, mode: int, correction: int, decay: float, scale: Tensor,
) -> None:  # fmt: skip
    """As apex's, which is told numbers by tensors, wants one number format and writes gradients back."""
    assert chunk == 65536 and mode == correction == 1
    for number, dtype in ((noop, torch.int32), (step, torch.int32), (lr, torch.float32),
                          (scale, torch.float32)):  # fmt: skip
        assert number.shape == (1,) and number.dtype == dtype
    assert {x.dtype for tensors in lists for x in tensors} == {torch.float32}
    assert all(x.is_contiguous() for tensors in lists for x in tensors)
    if noop == 1:
        return
    for g, p, m, v in zip(*lists, strict=True):
        g.mul_(scale)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        first, second = m / (1 - beta1 ** step.item()), v / (1 - beta2 ** step.item())
        p.sub_(lr * (first / (second.sqrt() + eps) + decay * p))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """amp_C, which apex is built into."""
    module: Any = ModuleType("amp_C")
    module.multi_tensor_adam_capturable = multi_tensor_adam_capturable
    monkeypatch.setitem(sys.modules, "amp_C", module)
    return module


@pytest.fixture
def on_a_cpu(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row runs there, too."""
    monkeypatch.setattr(ApexAdamW, "check", lambda self, device: None)


def updated(name: str, *, leave_out: bool) -> list[Tensor]:
    """Parameters, moments and gradients after five updates, each of them perhaps beside a bad one."""
    generator = torch.Generator().manual_seed(5)
    rule = RULES[name](OptimConfig(adam_beta2=0.95))
    parameters = [torch.randn(n, 3, generator=generator) for n in (1, 4)]
    states = [
        {moment: torch.zeros_like(p) for moment in ("exp_avg", "exp_avg_sq")} for p in parameters
    ]
    for steps in range(5):
        gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
        rates = {"steps": steps, "lr": 1e-2 * (steps + 1), "weight_decay": 0.1}
        if leave_out:
            bad = [torch.full_like(g, torch.nan) for g in gradients]
            rule.update(parameters, bad, states, taken=torch.tensor(False), **rates)  # type: ignore[arg-type]
            rule.update(parameters, gradients, states, taken=torch.tensor(True), **rates)  # type: ignore[arg-type]
        else:
            rule.update(parameters, gradients, states, **rates)  # type: ignore[arg-type]
    rule.update([], [], [], steps=0, lr=0.1, weight_decay=0.1)  # a rank may own nothing
    return [*parameters, *(state[name] for state in states for name in state), *gradients]


@pytest.mark.parametrize("leave_out", [False, True], ids=["all", "a bad one each time"])
def test_it_updates_as_our_adamw_and_leaves_out_what_the_device_does_not_take(
    package: ModuleType, leave_out: bool
) -> None:
    ours, theirs = (updated(name, leave_out=leave_out) for name in ("adam", "apex-adam"))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_a_run_learns_the_same_and_waits_for_nothing(on_a_cpu: None) -> None:
    first, second = assembled(0, 1, ADAM), assembled(0, 1, APEX)
    assert second[2].engine.waits_because == first[2].engine.waits_because == ""
    assert train(*second, 3) == pytest.approx(train(*first, 3), rel=1e-5)


@pytest.mark.parametrize("order", [(ADAM, APEX), (APEX, ADAM)], ids=["to apex", "from apex"])
def test_a_checkpoint_of_one_is_continued_by_the_other(on_a_cpu: None, tmp_path, order) -> None:
    saved, again = str(tmp_path / "saved"), str(tmp_path / "again")
    went_on = train_and_save(0, 1, order[0], saved, 2, 2)
    moved = load_and_save_again(0, 1, order[1], saved, again, 2)
    assert moved == pytest.approx(went_on, rel=1e-5)
    assert whole(tmp_path / "saved") == whole(tmp_path / "again")


def test_where_it_cannot_run_it_is_refused_before_the_first_step(monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"apex-adam needs a GPU, .* cpu; use --optimizer adam"):
        assembled(0, 1, APEX)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    rule = RULES["apex-adam"](OptimConfig())
    assert isinstance(rule, ApexAdamW)
    with pytest.raises(ConfigError, match=r"not importable \(ModuleNotFoundError.*install-gpu.md"):
        rule.check(torch.device("cuda"))


def test_an_apex_without_the_kernel_is_refused(package: ModuleType) -> None:
    rule = ApexAdamW(0.9, 0.95, 1e-8)
    rule.check(torch.device("cuda"))
    del package.__dict__["multi_tensor_adam_capturable"]
    with pytest.raises(
        ConfigError, match=r"amp_C is not importable \(AttributeError.*--optimizer adam"
    ):
        rule.check(torch.device("cuda"))


def test_a_rehearsal_stands_for_a_device_that_is_not_here() -> None:
    config = tiny_config(**APEX)
    with stand_in(config, draw(config, 1), 0) as actor:
        assert actor.run.engine.waits_because == ""
