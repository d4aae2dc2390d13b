"""The search: its bounds, what it finds beside a look at everything, and its lines behind a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import Op
from megatron_lite.blueprint.schedules.simulate import simulate
from megatron_lite.config.errors import ConfigError
from megatron_lite.planner.advice import layout_flags
from megatron_lite.planner.bubble import least_span, rough_span
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.planner.search import SearchResult, search
from megatron_lite.planner.space import layouts, recomputations, shardings
from tests.planner.runs import asked_of, cluster_of, read, variant_of

EVERYTHING = 10**6

LITTLE = "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --global-batch-size 64"


def _stage_seconds(rng: random.Random, stages: int, chunks: int) -> Callable[[Op, int], float]:
    """Stages alike but for the ends, or each a bit different."""
    forward = 1 / chunks
    inputs, weights = forward * rng.uniform(0.9, 1.3), forward * rng.uniform(0.7, 1.1)
    uneven, ends = (
        rng.choice([0.0, 0.0, 0.3]),
        {0: rng.uniform(0, 0.05), stages - 1: rng.uniform(0, 0.3)},
    )
    wide = [1 + uneven * (rng.random() - 0.5) for _ in range(stages)]

    def seconds(op: Op, stage: int) -> float:
        each = {Op.F: forward, Op.I: inputs, Op.W: weights, Op.B: inputs + weights}[op]
        return each * wide[stage] + ends.get(stage, 0.0)

    return seconds


def test_no_schedule_is_faster_than_its_bound_and_most_take_just_that() -> None:
    """Drawn stages, latencies and numbers of micro batches, fewer than stages too."""
    rng, off = random.Random(1), []
    for _ in range(200):
        name = rng.choice(["1f1b", "interleaved", "zb-h1", "zb-v", "gpipe"])
        pp = rng.choice([2, 3, 4, 6, 8, 12])
        chunks = {"interleaved": rng.choice([2, 3, 4, 6, 8, 12]), "zb-v": 2}.get(name, 1)
        number = rng.choice([1, 2, pp - 1, pp, pp + 1, 2 * pp - 1, 2 * pp, 3 * pp, 4 * pp + 1])
        if name == "interleaved":
            number = max(number // pp, 1) * pp
        placement = SCHEDULES[name].place(pp, chunks)
        seconds = _stage_seconds(rng, len(placement), chunks)
        latency = rng.choice([0, 0.01, 0.05, 0.1, 0.2]) / chunks
        least = least_span(name, placement, number, seconds, latency)
        rough = rough_span(name, placement, number, seconds, latency)
        assert rough <= least * (1 + 1e-9), (name, pp, chunks, number)
        schedule = SCHEDULES[name].generate(placement, number)
        takes = simulate(schedule, lambda a: seconds(a.op, a.stage), latency=latency).makespan  # noqa: B023
        assert least <= takes * (1 + 1e-9), (name, pp, chunks, number)
        off.append(takes / least - 1)
    off.sort()
    assert off[len(off) // 2] < 0.001 and off[-1] < 0.08, off[-5:]


def searched(model: str, world: int, top: int, hardware: str = "a100-80g") -> SearchResult:
    config = read("", model)
    return search(variant_of(config, world), asked_of(config), cluster_of(world, hardware),
                  model=config.model, top=top)  # fmt: skip


@pytest.fixture(scope="module")
def of_small() -> SearchResult:
    return searched(LITTLE, 8, EVERYTHING)


def test_a_search_looks_at_every_kind_of_layout(of_small: SearchResult) -> None:
    seen = [plan.asked.parallel for plan in of_small.ranked]
    assert {p.sequence_parallel for p in seen if p.tp > 1} == {True, False}
    assert {p.zero_stage for p in seen} == {0, 1}
    assert {p.pipeline_schedule for p in seen} == {"1f1b", "interleaved", "zb-h1", "zb-v"}
    assert {plan.asked.micro_batch_size for plan in of_small.ranked} >= {1, 2, 4, 8}
    assert {p.tp for p in seen} == {p.pp for p in seen} == {1, 2, 4, 8}
    assert of_small.num_slower == 0


def test_a_search_is_sorted_and_its_first_are_those_of_a_longer_one(of_small: SearchResult) -> None:
    times = [plan.rates.step_seconds for plan in of_small.ranked]
    assert times == sorted(times) and len(times) > 100
    few = searched(LITTLE, 8, 5)
    assert [plan.rates.step_seconds for plan in few.ranked] == times[:5]
    assert few.num_slower > 100


TIGHT = (
    "--num-layers 6 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096 --global-batch-size 16 "
    "--attention-backend unfused"
)


def all_plans(model: str, world: int, hardware: str) -> list[Forecast]:
    """Every layout, sharding and recomputation that fits, without bounds."""
    config, cluster, none = read("", model), cluster_of(world, hardware), frozenset[str]()
    asked, found = asked_of(config), []
    for layout, size in layouts(asked, cluster, config.model, none):
        for sharded in shardings(layout, world // layout.ranks_per_sample, asked.parallel, none):
            several = recomputations(sharded, config.model.num_layers // layout.pp, none)
            for choice in (one for some in several for one in some.layouts):
                try:
                    blueprint = variant_of(config, world)(choice, size)
                except ConfigError:
                    continue
                tried = PlanInputs(choice, config.precision, size)
                plan = forecast(blueprint, tried, cluster)
                found += [plan] * plan.fits
    return found


def test_bounds_lose_nothing_that_a_look_at_everything_finds() -> None:
    """Of a model for which something must be recomputed in many layouts."""
    found = searched(TIGHT, 2, 20, "a100-40g")
    every = all_plans(TIGHT, 2, "a100-40g")
    best: dict[tuple[object, ...], float] = {}
    for plan in every:
        p = plan.asked.parallel
        row = (p.tp, p.pp, p.sequence_parallel, p.pipeline_schedule, plan.asked.micro_batch_size,
               p.num_virtual_stages_per_pipeline_rank)  # fmt: skip
        best[row] = min(best.get(row, 1e9), plan.rates.step_seconds)
    assert len(every) > 2 * len(best) > 20
    assert [p.rates.step_seconds for p in found.ranked] == pytest.approx(sorted(best.values())[:20])
    again = {p.asked.parallel.recompute_granularity for p in found.ranked}
    assert again == {None, "selective", "full"}


@pytest.mark.parametrize(
    "layout", ["", "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2"]
)
def test_choices_of_recomputation_keep_less_and_take_longer_as_they_say(layout: str) -> None:
    """Which the search relies on: of what keeps less and less it looks at few."""
    model = f"{TIGHT} --num-layers 12 {layout}"
    config, none = read("", model), frozenset[str]()
    falling = 0
    for some in recomputations(config.parallel, 12 // config.parallel.pp, none):
        plans = [
            forecast(variant_of(config, 4)(choice, 2), PlanInputs(choice, config.precision, 2), cluster_of(4))
            for choice in some.layouts
        ]  # fmt: skip
        seconds = [plan.rates.step_seconds for plan in plans]
        assert all(
            one <= other * (1 + 1e-9) for one, other in zip(seconds, seconds[1:], strict=False)
        )
        if some.falling:
            kept = [plan.worst.total for plan in plans]
            assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
            falling += len(kept)
    assert falling >= 5


def test_the_lines_of_a_search_behind_the_model_give_the_same_plan(of_small: SearchResult) -> None:
    cluster = cluster_of(8)
    for plan in of_small.ranked[::10]:
        config = read(layout_flags(plan.asked.parallel, plan.asked.micro_batch_size), LITTLE)
        again = forecast(variant_of(config, 8)(config.parallel, config.train.micro_batch_size),
                         asked_of(config), cluster)  # fmt: skip
        assert again.rates == plan.rates and again.memory == plan.memory


def test_a_search_ranks_layouts_that_fit_and_finds_none_slower_than_the_given() -> None:
    found = searched("--num-layers 40 --hidden-size 5120 --num-attention-heads 40", 8, 3)
    assert len(found.ranked) == 3 and all(plan.fits for plan in found.ranked)
    config = read(
        "--tensor-model-parallel-size 8 --sequence-parallel",
        "--num-layers 40 --hidden-size 5120 --num-attention-heads 40",
    )
    given = forecast(variant_of(config, 8)(config.parallel, 2), asked_of(config), cluster_of(8))
    assert found.ranked[0].rates.step_seconds <= given.rates.step_seconds or not given.fits


def test_a_search_where_nothing_fits_names_the_closest() -> None:
    model = "--num-layers 96 --hidden-size 12288 --num-attention-heads 96"
    found = searched(model, 2, 10, "a100-40g")
    assert not found.ranked and found.closest is not None
