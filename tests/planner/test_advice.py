"""What plan.py advises where a run does not fit: the cheapest in time, and flags that are what they say."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.planner.advice import Change, cheapest_changes
from megatron_lite.planner.forecast import Forecast, forecast
from tests.planner.runs import asked_of, cluster_of, read, variant_of

WORLD = 4
RUNS = {
    "nothing shared": "--num-layers 20 --hidden-size 5120 --num-attention-heads 40",
    "in chunks, its optimizer shared": (
        "--num-layers 20 --hidden-size 5120 --num-attention-heads 40 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 5 --use-distributed-optimizer --overlap-param-gather "
        "--micro-batch-size 16"
    ),
    "an embedding and a head that count": (
        "--num-layers 14 --hidden-size 6144 --num-attention-heads 48 --pipeline-model-parallel-size 4 "
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --micro-batch-size 16"
    ),
    "all recomputed, its slices kept": (
        "--num-layers 20 --hidden-size 6144 --num-attention-heads 48 --tensor-model-parallel-size 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2 "
        "--distribute-saved-activations"
    ),
}


def plan_of(flags: str, world: int, hardware: str = "a100-80g") -> Forecast:
    config = read("", flags)
    return forecast(draw_up(config, world), asked_of(config), cluster_of(world, hardware))


def advised(flags: str, world: int) -> list[Change]:
    plan = plan_of(flags, world)
    assert not plan.fits
    return cheapest_changes(plan, variant_of(read("", flags), world))


def changed(flags: str, change: Change) -> str:
    """The command line as a user changes it."""
    kept = [part for part in flags.removeprefix("--").split(" --")
            if f"--{part.split()[0]}" not in change.without.split()]  # fmt: skip
    return "--" + " --".join(kept) + f" {change.flags}"


@pytest.mark.parametrize("run", RUNS)
def test_a_change_fits_and_its_flags_give_what_it_says(run: str) -> None:
    found = advised(RUNS[run], WORLD)
    times = [change.forecast.rates.step_seconds for change in found]
    assert found and times == sorted(times)
    for change in found:
        again = plan_of(changed(RUNS[run], change), WORLD)
        assert again.fits and again.rates == change.forecast.rates
        assert again.worst.total == change.forecast.worst.total


NEMOTRON = (
    "--num-layers 96 --hidden-size 18432 --num-attention-heads 96 --seq-length 4096 --vocab-size 256000 "
    "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --global-batch-size 64 "
    "--micro-batch-size 1 --num-virtual-stages-per-pipeline-rank 12 --disable-bias-linear "
    "--untie-embeddings-and-output-weights --position-embedding-type rope --group-query-attention "
    "--num-query-groups 8 --use-distributed-optimizer --overlap-param-gather --hidden-dropout 0 "
    "--attention-dropout 0 --sequence-parallel"
)
"""Nemotron-4 340B of NVIDIA's DGX Cloud benchmarks, on 256 H100."""


@pytest.mark.ci
def test_parts_of_a_layer_are_recomputed_where_that_is_cheaper_than_whole_layers() -> None:
    plan = plan_of(NEMOTRON, 256, "h100")
    found = cheapest_changes(plan, variant_of(read("", NEMOTRON), 256))
    assert not plan.fits
    (again,) = (change for change in found if change.flags.startswith("--recompute"))
    assert again.flags == "--recompute-granularity selective --recompute-modules mlp"
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    more = {
        flags: plan_of(f"{NEMOTRON} {flags}", 256, "h100").rates.step_seconds
        for flags in (full, "--recompute-granularity selective --recompute-modules core_attn mlp")
    }
    assert again.forecast.rates.step_seconds <= min(more.values()) <= 0.95 * more[full]
