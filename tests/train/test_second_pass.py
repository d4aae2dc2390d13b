"""A second pass: another objective over the same micro batches, whose gradients somebody uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from megatron_lite.engines.base import Engine
from megatron_lite.layers.outputs import Outputs
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.assemble import assemble
from megatron_lite.train.health.guards import StepNumbers
from megatron_lite.train.objectives.language_model import LanguageModel
from megatron_lite.train.run import Run
from megatron_lite.train.second_pass import SecondPass, Used
from megatron_lite.train.step import train_step
from tests.support.axes import PP, SP, TP, ZERO
from tests.support.engines import counted
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

STEPS, EVERY = 5, 2


@dataclass(frozen=True, slots=True)
class Sampled(LanguageModel):
    """Cross entropy of labels that are not the data's, as Gauss-Newton-Bartlett's are (arXiv:2305.14342)."""

    seen: list[list[int]] = field(default_factory=list)

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        """Of the token after the label in the vocabulary; notes which samples it sees."""
        self.seen.append(batch.positions.samples.tolist())
        other = replace(batch, labels=(batch.labels + 1) % outputs.context.vocab_size)
        return LanguageModel.loss(self, outputs, other)


@dataclass
class Curvature:
    """A mean of squared gradients, of the tensors that this rank updates: Sophia's h."""

    run: Run
    h: dict[str, Tensor] = field(default_factory=dict)

    def use(self, engine: Engine, seen: StepNumbers, weight: float) -> Used:
        """Take a share of the squares in."""
        for piece in counted(engine.gradients(owned=True), self.run.ctx):
            place = f"{piece.name} {piece.offset}"
            old = self.h.setdefault(place, torch.zeros_like(piece.data))
            old.mul_(0.9).addcmul_(piece.data, piece.data, value=0.1)
        return Used({"norm": seen.grad_norm, "weight": weight})

    def total(self) -> float:
        """Of all that this rank holds."""
        return sum(float(h.double().sum()) for h in self.h.values())


def trained(rank, ranks, changes, with_pass):
    """(loss and gradient norm, told) of each step, the curvature's sum here, samples seen by both."""
    config = tiny_config(optim__optimizer="sgd", **changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    curvature = Curvature(run)
    other = Sampled()
    if with_pass:
        run.second_passes.append(SecondPass("hessian", lambda step: other, EVERY, curvature.use))
    steps, fed = [], []
    for step in range(STEPS):
        run.progress.step = step
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
        fed += [] if step % EVERY else [batch.sample_numbers.tolist() for batch in batches]
        result = train_step(run, batches, lr=0.05, weight_decay=0.0)
        numbers = result.loss.item(), result.update.grad_norm.item()
        steps.append((numbers, dict(result.metrics)))
    return steps, curvature.total(), other.seen, fed


@pytest.fixture(scope="module")
def serial():
    (found,) = spawn(trained, 1, {}, True)
    return found


def test_it_is_carried_out_in_every_other_step_and_changes_no_bit_of_the_training(serial) -> None:
    steps, total, seen, fed = serial
    (plain,) = spawn(trained, 1, {}, False)
    assert [numbers for numbers, _ in steps] == [numbers for numbers, _ in plain[0]]
    told = {"hessian/loss", "hessian/norm", "hessian/weight"}
    assert [set(metrics) for _, metrics in steps] == [told, set(), told, set(), told]
    assert seen == fed and total > 0.0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({PP: 2}, id="pp2"),
        pytest.param({TP: 2, SP: True}, id="tp2", marks=pytest.mark.ci),
        pytest.param({ZERO: 1}, id="dp2, sharded", marks=pytest.mark.ci),
    ],
)
def test_in_a_layout_it_sees_the_same_micro_batches_and_leaves_the_same_numbers(
    serial, changes
) -> None:
    found = spawn(trained, 2, changes, True)
    for steps, _, seen, fed in found:
        assert seen in ([], fed)  # the last stage scores
        for (numbers, told), (its_numbers, its_told) in zip(steps, serial[0], strict=True):
            assert numbers == pytest.approx(its_numbers, rel=1e-4)
            assert told == pytest.approx(its_told, rel=1e-4)
    assert any(seen for _, _, seen, _ in found)
    assert sum(total for _, total, _, _ in found) == pytest.approx(serial[1], rel=1e-4)
