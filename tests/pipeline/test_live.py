"""What a rank holds: live activations as simulated, outputs freed after sending."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.blueprint.schedules.simulate import simulate
from megatron_lite.kernels import reference
from megatron_lite.layers.dropout import step_dropout
from megatron_lite.layers.gradients import DeferredWgrad, WeightGradients, WgradOperand
from megatron_lite.layers.mlp import MLP
from megatron_lite.models.gpt import GPTBlock
from megatron_lite.parallel.context import Axis
from megatron_lite.pipeline.mail import Mail
from megatron_lite.pipeline.stage import MicroBatch, Stage
from megatron_lite.planner.memory import PlanInputs, stage_waiting
from megatron_lite.train.assemble import assemble
from megatron_lite.train.feed import to_device
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, CHUNKS, SCHEDULE, SP
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

PP, MICROBATCHES = 4, 8
ALONE = Axis("none")
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "gpipe": {SCHEDULE: "gpipe"},
    "interleaved": {CHUNKS: 2},
    "zb-h1": {SCHEDULE: "zb-h1"},
    "zb-v": {SCHEDULE: "zb-v"},
}


def tiny(name: str):
    return tiny_config(
        parallel__pipeline_model_parallel_size=PP,
        model__num_layers=8,
        train__micro_batch_size=1,
        train__global_batch_size=MICROBATCHES,
        **SCHEDULES[name],
    )


@dataclass
class Gauge:
    """Counts the memory blocks of one activation per stage: the input of its first up-projection."""

    live: int = 0
    peak: int = 0

    def watch(self, stage: nn.Module) -> None:
        linear = next(m for name, m in stage.named_modules() if name.endswith("mlp.up"))
        linear.register_forward_pre_hook(self._enter)

    def _enter(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.live += 1
        self.peak = max(self.peak, self.live)
        weakref.finalize(args[0].untyped_storage(), self._leave)

    def _leave(self) -> None:
        self.live -= 1


def peaks(rank: int, ranks: int) -> dict[str, tuple[int, int, int]]:
    """Per schedule: activations in memory at the worst moment, micro batches the executor held
    then, and activations in memory after the step."""
    found = {}
    for name in SCHEDULES:
        config = tiny(name)
        blueprint = draw(config, ranks)
        ctx = context(blueprint, rank)
        run = assemble(config, blueprint, ctx)
        gauge = Gauge()
        for stage in run.pipeline.stages.values():
            gauge.watch(stage.module)
        train_step(run, make_batches(config, blueprint, 0, 0), lr=1e-3, weight_decay=0.0)
        found[name] = (gauge.peak, run.pipeline.peak_live, gauge.live)
    return found


@pytest.fixture(scope="module")
def measured() -> list[dict[str, tuple[int, int, int]]]:
    return spawn(peaks, PP)


@pytest.mark.parametrize("name", SCHEDULES)
def test_measured_peak_of_live_activations_is_the_simulated_one(name, measured):
    simulated = simulate(draw(tiny(name), PP).compute(MICROBATCHES)).peak_live
    assert tuple(rank[name][0] for rank in measured) == simulated
    assert tuple(rank[name][1] for rank in measured) == simulated
    assert [rank[name][2] for rank in measured] == [0] * PP


class Doubled(nn.Module):
    """A stage of one layer whose output nobody needs for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, at: Any) -> Tensor:
        return x * self.factor


def test_an_output_is_freed_once_it_is_sent_and_backward_still_works() -> None:
    stage = Stage(1, Doubled(), False, False, score=None, gradients=WeightGradients())  # type: ignore[arg-type]
    batch = MicroBatch(torch.zeros(1), torch.zeros(1), torch.zeros(1), None)
    freed: list[int] = []
    outputs = []
    for m in range(3):
        y = stage.forward(m, batch, torch.full((4,), float(m + 1)), torch.ones(()))
        assert y is not None
        weakref.finalize(y.untyped_storage(), freed.append, m)
        outputs.append(y)
        del y
    assert freed == []
    outputs.pop(1)  # sent
    assert freed == [1]
    outputs.clear()
    assert sorted(freed) == [0, 1, 2]
    for m in range(3):
        dx = stage.backward(m, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert torch.equal(dx, torch.tensor([2.0, 4.0, 6.0, 8.0]))
    assert stage.module.factor.grad.item() == (1 + 2 + 3) * 10.0  # type: ignore[union-attr]
    assert stage.num_live == 0


def test_what_was_deferred_is_added_by_its_own_weight_action() -> None:
    weight = torch.zeros(2, 3)
    total = torch.zeros(2, 3)
    reported = []
    sink = WeightGradients()
    sink.attach([(weight, total)], lambda parameter: reported.append(parameter is weight))
    for m in (0, 1):
        sink.defer_to(m)
        assert sink.defers(weight)
        dy = torch.full((4, 2), m + 1.0)
        sink.defer(
            DeferredWgrad(
                weight,
                WgradOperand(dy, ALONE),
                WgradOperand(torch.ones(4, 3), ALONE),
                reference.linear_weight_gradient,
            )
        )
    sink.defer_to(None)
    assert sink.num_deferred == 2
    assert [waiting is weight for waiting in sink.pending_wgrads] == [True] * 2
    assert not total.any()
    sink.run(1)
    assert torch.equal(total, torch.full((2, 3), 8.0))
    assert not sink.defers(weight)
    ones = torch.ones(1, 2), torch.ones(1, 3)
    assert sink.matrix(weight, *ones, reference.linear_weight_gradient) is None
    sink.run(0)
    assert torch.equal(total, torch.full((2, 3), 13.0))
    assert sink.num_deferred == 0
    assert reported == [True] * 3


def deferred(rank: int, ranks: int, changes: dict[str, Any]) -> tuple[int, float]:
    """Bytes on the queue between I and W, blocks of memory counted once; and the planner's."""
    config = tiny_config(
        parallel__tensor_model_parallel_size=ranks, parallel__pipeline_schedule="zb-h1",
        train__global_batch_size=2, model__hidden_dropout=0.1, **changes,
    )  # fmt: skip
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    seen: list[int] = []
    carry_out = WeightGradients.run

    def weigh(sink: WeightGradients, microbatch: int) -> None:
        (jobs,) = sink._deferred.values()
        kept = [factor.kept.untyped_storage() for job in jobs for factor in (job.dy, job.x)]
        seen.append(sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values()))
        carry_out(sink, microbatch)

    WeightGradients.run = weigh  # type: ignore[method-assign]
    train_step(run, make_batches(config, blueprint, 0, 0), lr=1e-3, weight_decay=0.0)
    WeightGradients.run = carry_out  # type: ignore[method-assign]
    (bytes_kept,) = seen
    asked = PlanInputs(config.parallel, config.precision, 2, on_gpu=False)
    return bytes_kept, sum(stage_waiting(blueprint, asked, 0).values())


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {}),
        (2, {SP: True}),
        (4, {SP: True, BF16: True}),
        (2, {SP: True, "model__swiglu": True,
             "parallel__recompute_granularity": "full", "parallel__recompute_method": "uniform",
             "parallel__recompute_num_layers": 2}),
    ],
    ids=["alone", "tp", "tp-sp", "tp4-sp-bf16", "tp-sp-swiglu-recomputed"],
)  # fmt: skip
def test_a_deferred_micro_batch_keeps_what_the_planner_says(ranks, changes) -> None:
    for measured_bytes, planned in spawn(deferred, ranks, changes):
        assert measured_bytes == planned


@pytest.mark.parametrize("modules", [None, ["mlp", "core_attn"]], ids=["full", "selective"])
def test_i_computes_again_what_was_dropped_and_w_only_multiplies(modules) -> None:
    whole = {"recompute_method": "uniform", "recompute_num_layers": 2}
    how = {"recompute_modules": modules} if modules else whole
    config = tiny_config(
        parallel__pipeline_schedule="zb-h1", train__global_batch_size=6,
        parallel__recompute_granularity="selective" if modules else "full",
        **{f"parallel__{name}": value for name, value in how.items()},
    )  # fmt: skip
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    (stage,) = run.pipeline.stages.values()
    part = MLP if modules else GPTBlock
    seen: list[str] = []
    for module in stage.module.modules():
        if isinstance(module, part):
            module.register_forward_pre_hook(lambda *_: seen.append("layer"))
    actions = run.actions(3)
    batches = [to_device(b, run.ctx.device, dropout=step_dropout(run.context, 0))
               for b in make_batches(config, blueprint, 0, 0)]  # fmt: skip
    layers = config.model.num_layers
    expected = {Op.F: layers, Op.I: layers, Op.W: 0}
    for group in actions:
        seen.clear()
        run.pipeline.run([group], batches, torch.ones(()))
        assert len(seen) == expected.get(group[0].op, 0), group


def sends(rank: int, ranks: int, count: int) -> int:
    """The most messages this rank still held while it sent so many."""
    axis = Axis("pp", rank, ranks, tuple(range(ranks)), dist.group.WORLD)
    mail = Mail(axis, (0, 1))
    mail.expect((4,), torch.float32, torch.device("cpu"))
    held: set[int] = set()
    most = 0
    for m in range(count):
        if rank == 0:
            message = torch.full((4,), float(m))
            held.add(m)
            weakref.finalize(message.untyped_storage(), held.discard, m)
            mail.put(message, forward=True, stage=1, microbatch=m)
            del message
            mail.post([Action(Op.SEND_F, 0, m)])
            most = max(most, len(held))
        else:
            mail.post([Action(Op.RECV_F, 1, m)])
            assert mail.take(forward=True, stage=1, microbatch=m).tolist() == [float(m)] * 4
    mail.finish()
    assert not held
    return most


def test_a_rank_holds_few_sent_messages_however_many_it_sends() -> None:
    for count in (20, 40):
        sender, receiver = spawn(sends, 2, count)
        assert 1 <= sender <= 2
        assert receiver == 0
