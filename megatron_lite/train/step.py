"""One optimizer step, and one evaluation batch.

begin_step ──▶ Begun ──▶ settle: the host reads its numbers, judges, updates or discards
                   └───▶ ahead.py: the device decides, the host reads them a step later
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.data.batch import Batch
from megatron_lite.engines.base import Update
from megatron_lite.layers.dropout import step_dropout
from megatron_lite.layers.noise import step_noise
from megatron_lite.layers.stretching import step_stretch
from megatron_lite.optim.groups import Rates
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.pipeline.executor import Executor
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.ending.stop import NO_VOTE, StopVote
from megatron_lite.train.feed import numbers_to_device, to_device
from megatron_lite.train.health.culprit import earliest_over_ranks
from megatron_lite.train.health.guards import Act, Finding, StepNumbers, Verdict
from megatron_lite.train.health.replay import changed_suspect, summed_suspect, watched_pipeline
from megatron_lite.train.measured import Measured, measure_update
from megatron_lite.train.objectives.base import Objective, finished
from megatron_lite.train.objectives.promises import require_same_weight, scorer
from megatron_lite.train.readback import HostCopy
from megatron_lite.train.run import Run
from megatron_lite.train.second_pass import SecondPass


@dataclass(frozen=True, slots=True)
class Heard:
    """What a step has measured, on the host.

    grad_norm: rounded to fp32, as it is logged; taken: whether the device takes an update of it;
    agreed: what any rank asks for after it; weight: what the loss is the mean over.
    """

    seen: StepNumbers
    weight: float
    grad_norm: float
    taken: bool
    agreed: StopVote
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: mean over the global batch, on the device; heard: all that was measured, on the host.

    warnings: what the guards found; stop: why the run must end (the step was not applied then).
    metrics: the objective's numbers beside the loss; statistics: what the update measured on request.
    """

    loss: Tensor
    update: Update
    heard: Heard
    warnings: tuple[str, ...] = ()
    stop: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One forward and backward of a step, its gradients reduced: nothing is updated yet.

    All is on the device; only hear() reads, what `numbers` brings.  finite: which gradients are;
    taken: whether an update may be made of them.
    """

    objective: Objective
    scored: Sequence[Scored]
    loss: Tensor
    norm: Tensor
    finite: Tensor
    taken: Tensor
    numbers: HostCopy

    def hear(self) -> Heard:
        """Its numbers; waits until the device has come so far."""
        loss, norm, rounded, wrong, empty, taken, weight, count, *others = self.numbers.read()
        require_same_weight(self.objective, weight, count)
        votes, metrics = others[: len(NO_VOTE)], others[len(NO_VOTE) :]
        return Heard(
            StepNumbers(loss, norm, int(wrong), bool(empty)),
            weight=weight,
            grad_norm=rounded,
            taken=bool(taken),
            agreed=StopVote(*(vote > 0 for vote in votes)),
            metrics=finished(self.objective, metrics, weight),
        )


class Told(NamedTuple):
    """What a step's second passes told: numbers by name, and warnings."""

    numbers: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Begun:
    """A step whose forward and backward are in flight, with all that is needed to run it again.

    before: steps done before it; weight, votes: summed over the ranks, and of this rank, on the
    device; beside: what its second passes told; due: those.
    """

    before: int
    batches: Sequence[Batch]
    micro: Sequence[MicroBatch]
    weight: Tensor
    votes: Tensor
    due: Sequence[SecondPass]
    beside: Told
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Sums:
    """Over all micro batches and ranks: loss, weight, metrics [n] in the objective's order, fp64.

    others: what else was summed with them.
    """

    total: Tensor
    count: Tensor
    metrics: Tensor
    others: Tensor

    def tolist(self) -> list[float]:
        """Loss, weight and metrics, one after the other.  Waits for the device."""
        whole = torch.stack([self.total, self.count, *self.metrics])
        return [float(value) for value in whole.tolist()]


def train_step(run: Run, batches: Sequence[Batch], *, lr: float, weight_decay: float,
               decoupled_lr: float | None = None, vote: StopVote = NO_VOTE) -> StepResult:  # fmt: skip
    """Forward and backward over this rank's micro batches, then the update.  Collective over the world.

    Waits for the device once before the update.
    """
    begun = begin_step(run, batches, vote)
    return settle(run, begun, Rates(lr, weight_decay, decoupled_lr))


def begin_step(run: Run, batches: Sequence[Batch], vote: StopVote = NO_VOTE) -> Begun:
    """Forward and backward over this rank's micro batches, gradients reduced.  Collective over the world.

    The gradient is that of the mean loss over the whole global batch: each micro batch's loss sum
    is scaled by 1 / the objective's weight of them all (a language model's tokens), which is known
    before the first forward.  Waits for the device only where a second pass is due.
    """
    device = run.ctx.device
    told = numbers_to_device([_own_weight(run, batches), *map(float, vote)], device)
    weight, votes = _whole_weight(run, told[0]), told[1:]
    dropout = step_dropout(run.context, run.progress.step)
    noise = step_noise(run.context, run.progress.step)
    stretch = step_stretch(run.context, run.progress.step)
    micro = [
        to_device(b, device, training=True, dropout=dropout, noise=noise, stretch=stretch)
        for b in batches
    ]
    run.expect_messages(batches[0])
    due = [second for second in run.second_passes if second.is_due(run.progress.step)]
    beside = _carry_out(due, run, batches, micro)
    attempt = _attempt(run, run.pipeline, micro, weight, votes)
    return Begun(run.progress.step, batches, micro, weight, votes, due, beside, attempt)


def settle(run: Run, begun: Begun, rates: Rates) -> StepResult:
    """Hear what a step has measured, judge it, and only then update or discard.

    The guards judge loss and gradient before the update; where they ask for it, the step runs again
    first.  Its gradients may be gone, not its weights: what runs again begins from them.  Collective
    over the world.
    """
    attempt = begun.attempt
    heard = attempt.hear()
    if heard.seen.empty:
        update = run.engine.discard(attempt.norm)
        warning = _nothing_counts(run, begun.batches)
        numbers, warnings = begun.beside
        return StepResult(attempt.loss, update, heard, (*warnings, warning), metrics=numbers)
    verdict = run.guards.judge(heard.seen, run.progress)
    told = verdict.what
    if verdict.replay:
        attempt, heard, verdict, told = _again(run, begun, heard, verdict)
    elif told and not heard.seen.finite:
        culprit, _ = earliest_over_ranks(summed_suspect(run, attempt.finite), run.ctx)
        told += f"; {culprit.text}" if culprit else ""
    run.guards.note(heard.seen, run.progress)
    if verdict.act >= Act.SKIP:
        update = run.engine.discard(attempt.norm)
    else:
        with run.timers.span("optimizer"):
            update = run.engine.apply(attempt.norm, **rates._asdict())
    result = result_of(begun, attempt, heard, update, told)
    measured = measure_update(update, begun.due, run.engine)
    if measured is not None:
        result = with_measured(result, measured)
    if verdict.act is Act.STOP:
        said = f"iteration {begun.before + 1}: {told} - {verdict.advice}"
        return replace(result, warnings=(), stop=said)
    return result


def result_of(
    begun: Begun, attempt: Attempt, heard: Heard, update: Update, told: str
) -> StepResult:
    """What there is to say of a step; told: what the guards found, in words."""
    warnings = (f"iteration {begun.before + 1}: {told}",) if told else ()
    metrics = {**heard.metrics, **begun.beside.numbers}
    warnings = (*begun.beside.warnings, *warnings)
    return StepResult(attempt.loss, update, heard, warnings, metrics=metrics)


def with_measured(result: StepResult, measured: Measured) -> StepResult:
    """The same, with what measure_update() began to copy; waits for the device where it is not there yet."""
    statistics, metrics = measured.read()
    return replace(result, statistics=statistics, metrics={**result.metrics, **metrics})


def _nothing_counts(run: Run, batches: Sequence[Batch]) -> str:
    """The warning about a step whose objective's weight is 0, by the samples that it read."""
    first = run.progress.samples
    last = first + sum(len(batch.tokens) for batch in batches) * run.ctx.dp.size - 1
    return (
        f"iteration {run.progress.step + 1}: nothing in the samples {first} to {last} counts in the "
        "loss (the objective's weight is 0; a language model's is the tokens that no loss mask and no "
        "--eod-mask-loss leaves out): nothing to learn from them"
    )


def _own_weight(run: Run, batches: Sequence[Batch]) -> float:
    return sum(run.objective.weight(batch) for batch in batches)


def _whole_weight(run: Run, own: Tensor) -> Tensor:
    """Of all ranks' micro batches, 1 where nothing counts; fp64 scalar.  Collective over the world.

    A sum over dp would stand behind the all-gathers of parameters that are in flight there.
    """
    ctx = run.ctx
    if ctx.dp.size == 1:
        whole = own
    else:  # ranks with the same samples count once
        is_first = ctx.tp.rank == ctx.cp.rank == ctx.pp.rank == 0
        whole = all_reduce(own if is_first else own * 0.0, ctx.world)
    return whole.where(whole != 0.0, 1.0)


def _carry_out(
    due: Sequence[SecondPass], run: Run, batches: Sequence[Batch], micro: Sequence[MicroBatch]
) -> Told:
    """Second passes one after the other, from the weights the step begins with; what they tell."""
    numbers: dict[str, float] = {}
    warnings: list[str] = []
    for second in due:
        objective = second.objective(run.progress.step)
        number = second.microbatches(len(batches))
        score = scorer(objective)
        stages = {n: replace(stage, score=score) for n, stage in run.pipeline.stages.items()}
        pipeline = replace(run.pipeline, stages=stages)
        other = replace(run, objective=objective)
        sent = numbers_to_device(
            [_own_weight(other, batches[:number]), *map(float, NO_VOTE)], run.ctx.device
        )
        attempt = _attempt(other, pipeline, micro[:number], _whole_weight(other, sent[0]), sent[1:])
        heard = attempt.hear()  # waits for the device
        used = second.use(run.engine, heard.seen, heard.weight)
        run.engine.discard(attempt.norm)
        told = {"loss": heard.seen.loss, **heard.metrics, **used.numbers}
        numbers |= {f"{second.name}/{name}": value for name, value in told.items()}
        if used.warning:
            warnings.append(f"iteration {run.progress.step + 1}: {used.warning}")
    return Told(numbers, tuple(warnings))


def _attempt(
    run: Run, pipeline: Executor, micro: Sequence[MicroBatch], weight: Tensor, votes: Tensor
) -> Attempt:
    """Forward, backward, reduce; one collective then tells every rank what all have measured."""
    scale = (run.engine.loss_scale / weight).float()
    with run.timers.span("forward-backward"):
        scored = pipeline.run(run.actions(len(micro)), micro, scale)
        run.late_gradients()
    with run.timers.span("optimizer"):
        run.before_reduce()
        run.engine.reduce()
    own = run.engine.squared_norm()
    bad = own.finite.all().logical_not().double()
    sums = _sum_over_world(run, scored, torch.cat([torch.stack([own.share, bad]), votes]))
    squares, wrong, asked = sums.others[0], sums.others[1], sums.others[2:]
    loss, norm = sums.total / weight, squares.sqrt()
    taken = sums.count != 0
    if run.guards.refuse_non_finite:
        taken = taken & loss.isfinite() & norm.isfinite() & (wrong == 0)
    norm32 = norm.float()
    numbers = [loss, norm, norm32.double(), wrong, (sums.count == 0).double(), taken.double(),
               weight, sums.count, *asked, *sums.metrics]  # fmt: skip
    copied = HostCopy(torch.stack(numbers))
    return Attempt(run.objective, scored, loss, norm32, own.finite, taken, copied)


def _again(
    run: Run, begun: Begun, first: Heard, verdict: Verdict
) -> tuple[Attempt, Heard, Verdict, str]:
    """Run the step again from the same weights; returns what counts now, and the words for both.

    A step that comes out well the second time is taken, unless the guards say stop.
    """
    summed = summed_suspect(run, begun.attempt.finite)
    run.engine.discard(begun.attempt.norm)
    with watched_pipeline(run) as (pipeline, watched):
        second = _attempt(run, pipeline, begun.micro, begun.weight, begun.votes)
    heard = second.hear()
    now = run.guards.judge(heard.seen, run.progress)
    if now.replay:
        culprit, ranks = earliest_over_ranks(watched.first, run.ctx)
        where = f"; {culprit.text}" if culprit else ""
        count = f", {len(ranks)} ranks saw such" if len(ranks) > 1 else ""
        return second, heard, now, (
            f"{now.what}{where}{count}; run again from the same weights it is the same: "
            "the data or the code, not a passing fault of the machine"
        )  # fmt: skip
    changed = changed_suspect(run, begun.attempt.scored, second.scored, begun.micro)
    culprit, _ = earliest_over_ranks(changed or summed, run.ctx)
    where = f"; {culprit.text}" if culprit else ""
    told = (
        f"{verdict.what}{where}; run again from the same weights the loss is "
        f"{heard.seen.loss:g} and the gradient norm {heard.seen.grad_norm:g}: a passing "
        "fault of the machine"
    )
    if verdict.act is Act.STOP:
        advice = "do not trust that rank's device or memory: test it, and start again without it"
        return second, heard, Verdict(Act.STOP, (Finding(Act.STOP, advice=advice),)), told
    return (
        second,
        heard,
        now,
        f"{told} - the second result is taken; test that rank's device and memory",
    )


@torch.no_grad()
def evaluation_step(run: Run, batches: Sequence[Batch]) -> Sums:
    """Loss, weight and metrics of one global batch, summed over the world."""
    device = run.ctx.device
    micro = [to_device(b, device) for b in batches]
    run.expect_messages(batches[0])
    scored = run.pipeline.run(run.forward_actions(len(batches)), micro, None)
    return _sum_over_world(run, scored)


def _sum_over_world(run: Run, scored: Sequence[Scored], others: Tensor | None = None) -> Sums:
    """In one collective: the objective's answers, contributed by tp rank 0 only, and what is given."""
    names = [metric.name for metric in run.objective.metrics]
    end = 2 + len(names)
    sums = torch.zeros(end, dtype=torch.float64, device=run.ctx.device)
    if scored and run.ctx.tp.rank == 0:
        sums[0] = torch.stack([s.total for s in scored]).double().sum()
        sums[1] = torch.stack([s.count for s in scored]).double().sum()
        for place, name in enumerate(names, start=2):
            sums[place] = torch.stack([s.metrics[name] for s in scored]).double().sum()
    if others is not None:
        sums = torch.cat([sums, others])
    sums = all_reduce(sums, run.ctx.world)
    return Sums(sums[0], sums[1], sums[2:end], sums[end:])
