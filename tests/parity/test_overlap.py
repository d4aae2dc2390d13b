"""Overlap by an instrument: where results come only when waited for, layouts train to the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from megatron_lite.blueprint.buckets import IN_FLIGHT
from megatron_lite.config.rules import table as rules
from megatron_lite.engines.gathering import Gathers
from megatron_lite.parallel.calls.log import CallLog, compare_calls
from megatron_lite.parallel.calls.recorder import CallRecorder
from megatron_lite.parallel.collectives import Pending, all_reduce
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.pipeline.mail import Mail
from megatron_lite.train import step as steps
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from megatron_lite.train.step import evaluation_step, train_step
from tests.parity.compare import ALWAYS
from tests.parity.kinds import OVERLAP_GATHER, SMALL_BUCKETS, Layout
from tests.parity.layouts import LAYOUTS
from tests.support.axes import PP, ZERO
from tests.support.late import Event, Late
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

STEPS = 3
TOLD = {"telemetry__log_num_zeros_in_grad": True, "telemetry__log_params_norm": True}
QUICK = ("pp2-dp2-zb-h1-zero",)
"""Reductions and messages in both directions."""


@dataclass
class Seen:
    """A rank's numbers with gloo as it is and as it may be, and what happened in the second run."""

    plain: list[float]
    late: list[float]
    events: list[Event]
    log: CallLog
    gathering: list[int]
    reducing: list[int]
    shares_weights: bool


def trained(
    rank: int, ranks: int, changes: dict[str, Any], mutant: str = "none", seed: int | None = None
) -> Seen:
    """A few steps and an evaluation, twice."""
    config = tiny_config(**ALWAYS | TOLD | changes)
    rules.check_config(config, ranks)
    blueprint = draw(config, ranks)
    ctx = context(blueprint, rank)
    plain = numbers(config, ctx, lambda run: None)
    log, late = CallLog(rank, pp=ctx.pp.rank), Late(ctx, seed=seed)
    with late.everywhere(), MUTANTS[mutant]():
        after = numbers(config, ctx.observed(CallRecorder(log)), lambda run: note(run, late))
    flying = (late.in_flight(op, ctx.replicas.name) for op in ("all-gather", "reduce-scatter"))
    return Seen(plain, after, late.events, log, *flying, config.parallel.shares_weights)


def numbers(config: Any, ctx: ParallelContext, prepare: Callable[[Run], None]) -> list[float]:
    """What a few steps and an evaluation come to on this rank."""
    blueprint = draw(config, ctx.world_size)
    run = assemble(config, blueprint, ctx)
    prepare(run)
    found = []
    for step in range(STEPS):
        run.progress.step = step
        batches = make_batches(config, blueprint, ctx.dp.rank, step, ragged=True)
        told = train_step(run, batches, lr=1e-2, weight_decay=0.1)
        found += [told.loss.item(), told.update.grad_norm.item(), *told.statistics.values()]
    batches = make_batches(config, blueprint, ctx.dp.rank, STEPS, ragged=True)
    return found + evaluation_step(run, batches).tolist()


def note(run: Run, late: Late) -> None:
    """Have each block's forward among the events."""
    for stage in run.pipeline.stages.values():
        for block in stage.module.blocks.values():  # type: ignore[attr-defined, union-attr]
            block.register_forward_pre_hook(lambda module, inputs: late.note("a block"))


@contextmanager
def no_wait() -> Iterator[None]:
    """A result is taken as it is."""
    with mock.patch.object(Pending, "wait", lambda pending: pending._result):
        yield


@contextmanager
def early_bucket() -> Iterator[None]:
    """Gradients are reduced when the last backward begins, as if all were there."""
    with mock.patch("megatron_lite.engines.buckets._reports", lambda local: 0):
        yield


@contextmanager
def early_take() -> Iterator[None]:
    """A message is taken before it has come."""
    real = Mail.take

    def take(mail: Mail, **key: Any) -> Tensor:
        mail._works.clear()
        return real(mail, **key)

    with mock.patch.object(Mail, "take", take):
        yield


@contextmanager
def write_after_send() -> Iterator[None]:
    """A message is written to once it is on its way."""
    real = Mail.post

    def post(mail: Mail, group: Any) -> None:
        real(mail, group)
        for _, messages in mail._sent:
            messages[0].detach().add_(1.0)

    with mock.patch.object(Mail, "post", post):
        yield


@contextmanager
def sum_over_dp() -> Iterator[None]:
    """The objective's weight is summed where parameters are being gathered."""

    def whole(run: Run, own: Tensor) -> Tensor:
        return all_reduce(own, run.ctx.dp)

    with mock.patch.object(steps, "_whole_weight", whole):
        yield


@contextmanager
def all_at_once() -> Iterator[None]:
    """Every gather of an update starts with the first."""
    with mock.patch("megatron_lite.engines.gathering.IN_FLIGHT", 1000):
        yield


@contextmanager
def all_waited_for() -> Iterator[None]:
    """The first layer waits for the parameters of all."""
    with mock.patch.object(Gathers, "wait_for", lambda gathers, bucket: gathers.wait_for_all()):
        yield


MUTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "none": nullcontext,
    **{
        made.__name__: made
        for made in (
            no_wait, early_bucket, early_take, write_after_send, sum_over_dp, all_at_once,
            all_waited_for,
        )
    },
}  # fmt: skip
STAGES = (1, 2, 3)
OVERLAP = {ZERO: 1} | OVERLAP_GATHER | SMALL_BUCKETS
PP2 = {PP: 2}


def sharing_weights() -> Iterator[Layout]:
    """Those of the table that share the optimizer's state, with all else shared as well."""
    for entry in LAYOUTS:
        if entry.changes.get(ZERO) == 1:
            name = f"{entry.name}-stage3"
            yield replace(entry, name=name, changes=entry.changes | {ZERO: 3})


def require_sound(ranks: list[Seen]) -> None:
    """Same bits, calls that fit each other, few packed copies at once."""
    for seen in ranks:
        assert seen.late == seen.plain, "other numbers"
        assert max(seen.reducing, default=0) <= IN_FLIGHT
        assert max(seen.gathering, default=0) <= IN_FLIGHT, "so many in flight"
    matched, wrong = compare_calls([seen.log for seen in ranks])
    assert wrong == [] and matched.collectives > 0


def require_prefetch(ranks: list[Seen]) -> None:
    """Where weights are shared: while a block runs those of the next layers are on their way."""
    for seen in ranks:
        flying, under = 0, []
        for event in seen.events:
            if event.what == "all-gather":
                flying += 1 if event.kind == "begin" else -1
            under += [flying] * (event.kind == "note")
        learned = 4  # in the first forward of all the order of use is not known
        assert under[:learned] == [0] * learned and 0 not in under[learned:], under


def require_overlap(ranks: list[Seen]) -> None:
    """Parameters are gathered in the order of use, few at a time, while the first forward runs."""
    for seen in ranks:
        assert max(seen.gathering) == max(seen.reducing) == IN_FLIGHT
        gathered = sum(event.what == "all-gather" and event.kind == "end" for event in seen.events)
        each, ended, blocks = gathered // STEPS, 0, []
        for event in seen.events:
            ended += event.what == "all-gather" and event.kind == "end"
            blocks += [ended] * (event.kind == "note")
        for update in range(STEPS):
            # each block has waited for its own parameters, and not for those of the next
            first = [n - update * each for n in blocks if 0 < n - update * each < each]
            assert len(first) == 4 and first == sorted(set(first)), "in the order of use"


@pytest.fixture(scope="module", params=STAGES)
def overlapped(request):
    overlap = OVERLAP if request.param < 3 else SMALL_BUCKETS
    return spawn(trained, 2, overlap | {ZERO: request.param})


def test_parameters_are_gathered_in_the_order_of_use_under_computation(overlapped) -> None:
    if overlapped[0].shares_weights:
        require_prefetch(overlapped)
    else:
        require_overlap(overlapped)


def test_they_are_the_same_bits_where_everything_is_late(overlapped) -> None:
    require_sound(overlapped)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.name, marks=() if entry.name in QUICK else pytest.mark.slow)
        for entry in [*LAYOUTS, *sharing_weights()]
        if entry.ranks > 1
    ],
)
def test_a_layout_trains_to_the_same_bits_where_everything_is_late(entry) -> None:
    require_sound(spawn(trained, entry.ranks, entry.shared | entry.changes, deadline=600.0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["tp2-pp2-dp2-sp-zb-v-zero-recompute", "pp2-dp2-interleaved-zero"])
def test_it_does_so_whoever_is_ahead(name, seed) -> None:
    (entry,) = (entry for entry in LAYOUTS if entry.name == name)
    changes = entry.shared | entry.changes
    require_sound(spawn(trained, entry.ranks, changes, "none", seed, deadline=600.0))


@pytest.mark.parametrize(
    ("mutant", "changes", "said"),
    [
        ("early_bucket", {}, "the result of all-reduce over dp, .* was written to before"),
        ("sum_over_dp", OVERLAP, "blocks behind 2 in flight there: all-gather"),
        *(
            pytest.param(*row, marks=pytest.mark.ci)
            for row in [
                ("no_wait", {}, "all-reduce over dp, .* never waited for"),
                ("early_take", PP2, "messages over pp, .* never waited for|other numbers"),
                ("write_after_send", PP2, "the source of messages over pp, .* was changed before"),
                ("all_at_once", OVERLAP, "so many in flight"),
                ("all_waited_for", OVERLAP, "in the order of use"),
            ]
        ),
    ],
)
def test_the_instrument_notices(mutant, changes, said) -> None:
    with pytest.raises(AssertionError) as caught:
        ranks = spawn(trained, 2, changes, mutant)
        require_sound(ranks)
        require_overlap(ranks)
    told = [str(caught.value), *getattr(caught.value, "errors", {}).values()]
    assert any(re.search(said, one) for one in told), told
