"""One optimizer step, and one evaluation batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_lite.data.batch import Batch
from megatron_lite.engines.base import Update
from megatron_lite.layers.dropout import step_dropout
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.pipeline.executor import Executor
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.ending.stop import NO_VOTE, StopVote
from megatron_lite.train.feed import to_device
from megatron_lite.train.health.culprit import earliest_over_ranks
from megatron_lite.train.health.guards import Act, Finding, StepNumbers, Verdict
from megatron_lite.train.health.replay import changed_suspect, summed_suspect, watched_pipeline
from megatron_lite.train.objectives.base import finished
from megatron_lite.train.objectives.promises import require_same_weight, scorer
from megatron_lite.train.run import Run


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: mean over the global batch; votes: ranks that ask for a stop, by StopVote's fields.

    warnings: what the guards found; stop: why the run must end (the step was not applied then).
    metrics: the objective's numbers beside the loss.
    """

    loss: Tensor
    update: Update
    votes: Tensor
    warnings: tuple[str, ...] = ()
    stop: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One forward and backward of a step, its gradients reduced: nothing is updated yet."""

    scored: Sequence[Scored]
    loss: Tensor
    norm: Tensor
    votes: Tensor
    measured: StepNumbers
    metrics: Mapping[str, float]


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

    The gradient is that of the mean loss over the whole global batch: each micro batch's loss sum
    is scaled by 1 / the objective's weight of them all (a language model's tokens), which is known
    before the first forward.  The guards judge loss and gradient before the update; where they ask
    for it, the step runs again first.
    Waits for the device once before the update.
    """
    device = run.ctx.device
    weight = _weight(run, batches)
    dropout = step_dropout(run.context, run.progress.step)
    micro = [to_device(b, device, dropout=dropout) for b in batches]
    run.expect_messages(batches[0])
    beside = _second_passes(run, batches, micro)
    attempt = _attempt(run, run.pipeline, micro, weight, vote)
    if attempt.measured.empty:
        update = run.engine.discard(attempt.norm)
        return StepResult(
            attempt.loss, update, attempt.votes, (_nothing_counts(run, batches),), metrics=beside
        )
    verdict = run.guards.judge(attempt.measured, run.progress)
    told = verdict.what
    if verdict.replay:
        attempt, verdict, told = _again(run, attempt, verdict, micro, weight, vote)
    elif told and not attempt.measured.finite:
        culprit, _ = earliest_over_ranks(summed_suspect(run), run.ctx)
        told += f"; {culprit.text}" if culprit else ""
    run.guards.note(attempt.measured, run.progress)
    if verdict.act >= Act.SKIP:
        update = run.engine.discard(attempt.norm)
    else:
        with run.timers.span("optimizer"):
            update = run.engine.apply(
                attempt.norm, lr=lr, weight_decay=weight_decay, decoupled_lr=decoupled_lr
            )
    said = f"iteration {run.progress.step + 1}: {told}"
    metrics = {**attempt.metrics, **beside}
    result = StepResult(attempt.loss, update, attempt.votes, metrics=metrics)
    if verdict.act is Act.STOP:
        return replace(result, stop=f"{said} - {verdict.advice}")
    return replace(result, warnings=(said,) if told else ())


def _nothing_counts(run: Run, batches: Sequence[Batch]) -> str:
    """The warning about a step whose objective's weight is 0, by the samples that it read."""
    first = run.progress.samples
    last = first + sum(len(batch.tokens) for batch in batches) * run.ctx.dp.size - 1
    return (
        f"iteration {run.progress.step + 1}: nothing in the samples {first} to {last} counts in the "
        "loss (the objective's weight is 0; a language model's is the tokens that no loss mask and no "
        "--eod-mask-loss leaves out): nothing to learn from them"
    )


def _weight(run: Run, batches: Sequence[Batch]) -> Tensor:
    """Of all ranks' micro batches, 1 where nothing counts; fp64 scalar.  Collective over dp."""
    own = sum(run.objective.weight(batch) for batch in batches)
    whole = torch.tensor(own, dtype=torch.float64, device=run.ctx.device)
    whole = all_reduce(whole, run.ctx.dp)
    return whole.where(whole != 0.0, 1.0)


def _second_passes(
    run: Run, batches: Sequence[Batch], micro: Sequence[MicroBatch]
) -> dict[str, float]:
    """Those that are due, one after the other, from the weights the step begins with; what they tell."""
    told: dict[str, float] = {}
    for second in run.second_passes:
        if not second.is_due(run.progress.step):
            continue
        score = scorer(second.objective)
        stages = {n: replace(stage, score=score) for n, stage in run.pipeline.stages.items()}
        pipeline = replace(run.pipeline, stages=stages)
        other = replace(run, objective=second.objective)
        attempt = _attempt(other, pipeline, micro, _weight(other, batches), NO_VOTE)
        used = second.use(run.engine, attempt.measured)
        run.engine.discard(attempt.norm)
        numbers = {"loss": attempt.measured.loss, **attempt.metrics, **used}
        told |= {f"{second.name}/{name}": value for name, value in numbers.items()}
    return told


def _attempt(
    run: Run, pipeline: Executor, micro: Sequence[MicroBatch], weight: Tensor, vote: StopVote
) -> Attempt:
    """Forward, backward, reduce; one collective then tells every rank what all have measured."""
    scale = (run.engine.loss_scale / weight).float()
    with run.timers.span("forward-backward"):
        scored = pipeline.run(run.actions(len(micro)), micro, scale)
    with run.timers.span("optimizer"):
        run.before_reduce()
        run.engine.reduce()
    own = run.engine.squared_norm()
    extra = torch.stack([own.share, (~own.finite).double()])
    sums = _sum_over_world(run, scored, (*map(float, vote),), extra)
    squares, wrong, votes = sums.others[0], sums.others[1], sums.others[2:]
    loss, norm = sums.total / weight, squares.sqrt()
    measured = torch.stack(
        [loss, norm, wrong, (sums.count == 0).double(), weight, sums.count, *sums.metrics]
    ).tolist()  # waits for the device
    require_same_weight(run.objective, measured[4], measured[5])
    seen = StepNumbers(measured[0], measured[1], int(measured[2]), bool(measured[3]))
    metrics = finished(run.objective, measured[6:], measured[4])
    return Attempt(scored, loss, norm.float(), votes, seen, metrics)


def _again(
    run: Run,
    first: Attempt,
    verdict: Verdict,
    micro: Sequence[MicroBatch],
    weight: Tensor,
    vote: StopVote,
) -> tuple[Attempt, Verdict, str]:
    """Run the step again from the same weights; returns what counts now, and the words for both.

    A step that comes out well the second time is taken, unless the guards say stop.
    """
    summed = summed_suspect(run)
    run.engine.discard(first.norm)
    with watched_pipeline(run) as (pipeline, watched):
        second = _attempt(run, pipeline, micro, weight, vote)
    now = run.guards.judge(second.measured, run.progress)
    if now.replay:
        culprit, ranks = earliest_over_ranks(watched.first, run.ctx)
        where = f"; {culprit.text}" if culprit else ""
        count = f", {len(ranks)} ranks saw such" if len(ranks) > 1 else ""
        return second, now, (
            f"{now.what}{where}{count}; run again from the same weights it is the same: "
            "the data or the code, not a passing fault of the machine"
        )  # fmt: skip
    changed = changed_suspect(run, first.scored, second.scored, micro)
    culprit, _ = earliest_over_ranks(changed or summed, run.ctx)
    where = f"; {culprit.text}" if culprit else ""
    told = (
        f"{verdict.what}{where}; run again from the same weights the loss is "
        f"{second.measured.loss:g} and the gradient norm {second.measured.grad_norm:g}: a passing "
        "fault of the machine"
    )
    if verdict.act is Act.STOP:
        advice = "do not trust that rank's device or memory: test it, and start again without it"
        return second, Verdict(Act.STOP, (Finding(Act.STOP, advice=advice),)), told
    return second, now, f"{told} - the second result is taken; test that rank's device and memory"


@torch.no_grad()
def evaluation_step(run: Run, batches: Sequence[Batch]) -> Sums:
    """Loss, weight and metrics of one global batch, summed over the world."""
    device = run.ctx.device
    micro = [to_device(b, device) for b in batches]
    run.expect_messages(batches[0])
    scored = run.pipeline.run(run.forward_actions(len(batches)), micro, None)
    return _sum_over_world(run, scored)


def _sum_over_world(
    run: Run,
    scored: Sequence[Scored],
    votes: Sequence[float] = (),
    measured: Tensor | None = None,
) -> Sums:
    """In one collective: the objective's answers, contributed by tp rank 0 only, and what is given."""
    names = [metric.name for metric in run.objective.metrics]
    end = 2 + len(names)
    sums = torch.zeros(end, dtype=torch.float64, device=run.ctx.device)
    if scored and run.ctx.tp.rank == 0:
        sums[0] = torch.stack([s.total for s in scored]).double().sum()
        sums[1] = torch.stack([s.count for s in scored]).double().sum()
        for place, name in enumerate(names, start=2):
            sums[place] = torch.stack([s.metrics[name] for s in scored]).double().sum()
    if measured is not None:
        asked = torch.tensor(votes, dtype=torch.float64, device=run.ctx.device)
        sums = torch.cat([sums, measured, asked])
    sums = all_reduce(sums, run.ctx.world)
    return Sums(sums[0], sums[1], sums[2:end], sums[end:])
