"""Gradient reductions of a split backward start under its last weight gradients, bucket by bucket.

The order of events, not their time: every bucket's collective is started right after the product
that completes it, while products of the same W are still to come.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from megatron_lite.engines.buckets import GradientBuckets
from megatron_lite.layers.gradients import WeightGradients
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import SCHEDULE, ZERO
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config


class Seen(NamedTuple):
    """One stage of one rank, in the order they were armed; places are numbers of events on that rank.

    products: where each matrix product was added; filled: per bucket, its last contribution of any
    kind; started: per bucket, its collective; armed, step: where the stage was armed, and where the
    optimizer step began.
    """

    products: list[int]
    filled: list[int]
    started: list[int]
    armed: int
    step: int


def order_of_events(rank: int, ranks: int, changes: dict[str, Any]) -> dict[int, Seen]:
    config = tiny_config(
        parallel__pipeline_model_parallel_size=2, parallel__ddp_bucket_size=2000, **changes
    )
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    clock = iter(range(10**6))
    arrived: dict[Any, int] = {}
    products: dict[Any, list[int]] = {}
    started: dict[int, int] = {}
    armed: dict[GradientBuckets, int] = {}  # of one stage each
    start, ready, arm = (
        GradientBuckets._start,
        GradientBuckets.ready,
        GradientBuckets.begin_last_backward,
    )
    accumulate = WeightGradients._accumulate

    def note_start(self, bucket):
        started[id(bucket)] = next(clock)
        start(self, bucket)

    def note_arm(self, pending_wgrads):
        armed[self] = next(clock)
        arm(self, pending_wgrads)

    def note_ready(self, parameter):
        arrived[parameter] = next(clock)
        ready(self, parameter)

    def note_product(self, weight, dy, x, product):
        products.setdefault(weight, []).append(next(clock))
        accumulate(self, weight, dy, x, product)

    GradientBuckets._start, GradientBuckets.ready = note_start, note_ready  # type: ignore
    GradientBuckets.begin_last_backward = note_arm  # type: ignore
    WeightGradients._accumulate = note_product  # type: ignore
    begun = []
    reduce = run.engine.reduce
    run.engine.reduce = lambda: (begun.append(next(clock)), reduce())[1]  # type: ignore
    try:
        train_step(run, make_batches(config, blueprint, run.ctx.dp.rank, 0), lr=1e-3,
                   weight_decay=0.0)  # fmt: skip
    finally:
        GradientBuckets._start, GradientBuckets.ready = start, ready  # type: ignore
        GradientBuckets.begin_last_backward = arm  # type: ignore
        WeightGradients._accumulate = accumulate  # type: ignore
    found = {}
    for number, held in enumerate(armed):
        of_stage = [local.parameter for bucket in held.buckets for local in bucket.locals]
        found[number] = Seen(
            sorted(place for p in of_stage for place in products.get(p, ())),
            [max(arrived[local.parameter] for local in b.locals) for b in held.buckets],
            [started[id(b)] for b in held.buckets],
            armed[held],
            begun[0],
        )
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "distributed-optimizer"])
@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v"])
def test_buckets_reduce_during_the_last_weight_gradients(schedule, sharded) -> None:
    changes = {
        SCHEDULE: schedule, ZERO: sharded
    }  # fmt: skip
    for ranks_view in spawn(order_of_events, 4, changes):
        for stage, seen in ranks_view.items():
            assert len(seen.started) > 2, "a test of one bucket shows nothing"
            assert max(seen.started) < seen.step, "a reduction waited for the optimizer step"
            before = seen.armed
            for start, filled in sorted(zip(seen.started, seen.filled, strict=True)):
                possible = max(filled, before)  # full, armed, and the bucket before it started
                passed = [product for product in seen.products if possible < product < start]
                assert start > possible and not passed, f"stage {stage}: {passed} came first"
                before = start
            under = sum(start < seen.products[-1] for start in seen.started)
            assert under >= len(seen.started) - 2, (stage, seen)
