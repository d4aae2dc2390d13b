"""The forecast's own arithmetic: extrapolation, sums, memory, what makes a run fit."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.planner import advice
from megatron_lite.planner.cost import Costs
from megatron_lite.planner.forecast import (
    Forecast,
    forecast,
    pipeline_seconds,
    rates,
    simulate_step,
)
from megatron_lite.planner.memory import static_bytes
from tests.planner.runs import asked_of, cluster_of, read


def planned(flags: str, world: int = 16, hardware: str = "a100-80g", **how: bool) -> Forecast:
    config = read(flags)
    cluster = cluster_of(world, hardware)
    return forecast(draw_up(config, world), asked_of(config), cluster, **how)


LAYOUTS = [
    "--pipeline-model-parallel-size 4",
    "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2",
    "--pipeline-model-parallel-size 4 --pipeline-schedule zb-h1",
    "--pipeline-model-parallel-size 4 --pipeline-schedule zb-v",
]


@pytest.mark.parametrize("flags", LAYOUTS)
def test_a_long_schedule_extrapolated_equals_the_whole_simulation(flags: str) -> None:
    config = read(flags)
    blueprint = draw_up(config, 16)
    cluster = cluster_of(16)
    costs = Costs(blueprint, asked_of(config), cluster)
    assert pipeline_seconds(costs, 64) == pytest.approx(simulate_step(costs, 64).makespan, rel=1e-6)


@pytest.mark.parametrize("flags", LAYOUTS)
def test_the_lower_bound_is_near_the_simulation(flags: str) -> None:
    exact, quick = planned(flags), planned(flags, simulated=False)
    assert quick.rates.step_seconds == pytest.approx(exact.rates.step_seconds, rel=0.03)


@pytest.mark.parametrize(
    "flags", ["", "--pipeline-model-parallel-size 2 --use-distributed-optimizer"]
)
def test_sequence_parallel_at_tp_1_changes_nothing(flags: str) -> None:
    """The trainer has nothing to split there, and says so."""
    told, plain = planned(f"{flags} --sequence-parallel"), planned(flags)
    assert dict(told.seconds) == dict(plain.seconds) and told.memory == plain.memory
    assert advice.layout_flags(told.asked.parallel, 1) == advice.layout_flags(
        plain.asked.parallel, 1
    )


def test_kinds_of_time_add_up_to_the_step() -> None:
    plan = planned("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2")
    assert sum(plan.seconds.values()) == pytest.approx(plan.rates.step_seconds)
    assert min(plan.seconds.values()) >= 0.0


@pytest.mark.parametrize(
    ("flags", "dp", "per_parameter"),
    [("", 1, 18), ("--use-distributed-optimizer", 8, 6 + 12 / 8),
     ("--use-distributed-optimizer", 64, 6 + 12 / 64)],
)  # fmt: skip
def test_static_bytes_per_parameter(flags: str, dp: int, per_parameter: float) -> None:
    """18 bytes in bf16 with fp32 gradients, 6 + 12/d sharded; 16 in fp32."""
    assert (
        sum(static_bytes({None: 1000}, 8000, asked_of(read(flags)), dp).values())
        == 1000 * per_parameter
    )


def test_the_first_stage_keeps_pp_micro_batches_and_the_last_one() -> None:
    plan = planned("--pipeline-model-parallel-size 4")
    assert [list(rank.live.values()) for rank in plan.memory] == [[4], [3], [2], [1]]


def test_more_recomputation_keeps_less_and_takes_longer() -> None:
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    plans = [
        planned(f"--attention-backend unfused {how}")
        for how in ("", "--recompute-granularity selective", full)
    ]
    kept = [plan.memory[0].kinds["activations"] for plan in plans]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3
    times = [plan.rates.step_seconds for plan in plans]
    assert times == sorted(times)


@pytest.mark.parametrize(("more", "share"), [("", 7 / 16), ("--attention-dropout 0.1", 1.0)])
def test_a_window_costs_its_band_but_where_it_is_a_mask(more: str, share: float) -> None:
    """A quarter of the sequence: 1 - (3/4)^2 of the causal half, by a kernel of shorter rows."""
    flags = f"--seq-length 8192 --attention-dropout 0 {more}"
    full, window = (planned(f"{flags} {how}") for how in ("", "--window-size 2047,0"))
    reached = full.cluster.device.attention_flops
    slower = reached(8192, 128) / reached(2048, 128) if share < 1 else 1.0
    of_full, of_window = (plan.costs.layer(0).forward.attention for plan in (full, window))
    assert of_window / of_full == pytest.approx(share * slower, rel=0.02)


@pytest.mark.parametrize("backend", ["auto", "unfused"])
def test_groups_of_s2_attention_cost_their_share_of_the_attention(backend: str) -> None:
    """A quarter of the sample each, less two quarters of one in half of the heads: 15/64 of the square."""
    flags = f"--seq-length 8192 --attention-dropout 0 --attention-backend {backend}"
    full, groups = (planned(f"{flags} {more}") for more in ("", "--s2-attention"))
    (of_full, of_groups) = (plan.costs.layer(0) for plan in (full, groups))
    share = of_groups.forward.attention / of_full.forward.attention
    reached = full.cluster.device.attention_flops
    slower = reached(8192, 128) / reached(2048, 128) if backend == "auto" else 1.0
    assert share == pytest.approx(15 / 64 * slower, rel=0.1)
    assert of_groups.forward.products == of_full.forward.products
    assert groups.rates.step_seconds < full.rates.step_seconds
    assert groups.worst.total <= full.worst.total * 1.1


def test_block_recomputation_counts_the_layers_that_each_stage_has() -> None:
    """Stages of 1, 5, 5 and 1 layers, at most 3 recomputed each: 8 of 12, whatever their mean is."""
    uneven = (
        "--num-layers 12 --hidden-size 1024 --num-attention-heads 16 "
        "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 1 "
        "--decoder-last-pipeline-num-layers 1 --recompute-granularity full --recompute-method "
    )

    def again(method: str) -> float:
        config = read("", f"{uneven}{method}")
        found = rates(draw_up(config, 16), asked_of(config), 1.0, 312.0)
        return found.tflops_hardware / found.tflops - 1

    block, every = (again(f"{how} --recompute-num-layers 3") for how in ("block", "uniform"))
    assert block == pytest.approx(every * 8 / 12)
