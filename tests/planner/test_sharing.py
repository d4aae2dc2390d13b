"""Memory and traffic of the ZeRO stages beside the paper's numbers, and each other's."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.hardware import Cluster, find_device
from megatron_lite.planner.memory import PlanInputs, static_bytes
from megatron_lite.planner.remarks import cautions
from megatron_lite.planner.sharing import passed

MODEL = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 1024 --vocab-size 50257 "
    "--micro-batch-size 1 --bf16 --mock-data --lr 1e-4 --train-iters 1"
)
GIB = 2.0**30


def planned(flags: str, stage: int, world: int = 8, batch: int = 32) -> Forecast:
    words = f"{MODEL} --global-batch-size {batch} --zero-stage {stage} {flags}".split()
    config = parse(words).config
    asked = PlanInputs.of(config.parallel, config.precision, config.train, config.data, on_gpu=True)
    cluster = Cluster(device=find_device("a100-80g"), world_size=world, devices_per_node=8)
    return forecast(draw_up(config, world), asked, cluster)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_static_memory_is_that_of_the_papers_figure(stage: int, gigabytes: float) -> None:
    """arXiv:1910.02054 figure 1: 7.5B parameters on 64 ranks, gradients in 16 bits."""
    flags = f"{MODEL} --zero-stage {stage} --no-accumulate-allreduce-grads-in-fp32".split()
    config = parse(flags).config
    asked = PlanInputs(config.parallel, config.precision, 1)
    kept = static_bytes({None: 7.5e9}, 8 * 7.5e9, asked, 64)
    assert sum(kept.values()) / 1e9 == pytest.approx(gigabytes, abs=0.06)


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_passes_are_those_of_the_paper_for_one_micro_batch(stage: int, passes: int) -> None:
    """arXiv:1910.02054 section 7: 2, 2 and 3 times the parameters; tables are read by no backward.

    Of a run's first micro batch: later ones keep the head whole between its forward and backward.
    """
    untied = "--untie-embeddings-and-output-weights --no-accumulate-allreduce-grads-in-fp32"
    plan = planned(untied, stage, batch=8)
    sent = passed(plan.blueprint, plan.asked.parallel, plan.asked.precision, 0, num_microbatches=1)
    held, figure = plan.blueprint.held(0).parameters, plan.blueprint.figure
    tables = figure.embedding.size * (stage == 3)
    assert sent.total == 2 * (passes * held - tables)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_and_weights_pass_once_per_micro_batch_or_with_a_pipeline_once(
    stage: int,
) -> None:
    for flags, times in (("", 5), ("--pipeline-model-parallel-size 2", 1)):
        plan = planned(flags, stage)
        one, five = (
            passed(plan.blueprint, plan.asked.parallel, plan.asked.precision, 0, num_microbatches=n)
            for n in (1, 5)
        )
        assert (one.times, five.times) == (1, times)
        once = one.total - one.updated - one.unknown
        assert five.total - five.updated - five.unknown == times * once - 3 * five.kept
        assert five.updated == one.updated and (one.updated > 0) == (stage == 2)


def test_each_stage_needs_less_memory_but_with_a_pipeline() -> None:
    alone = [planned("", stage).worst.total for stage in range(4)]
    assert alone == sorted(alone, reverse=True) and len(set(alone)) == 4
    first, second, third = (planned("--pipeline-model-parallel-size 2", n) for n in (1, 2, 3))
    assert first.seconds == second.seconds
    gradients = first.memory[0].kinds["gradients"]  # a fourth of them beside whole ones
    assert second.memory[0].kinds["whole"] == gradients == 4 * second.memory[0].kinds["gradients"]
    assert second.worst.total == pytest.approx(first.worst.total + 1.05 * gradients / 4)
    rows = third.memory[0].kinds["weights"]
    assert third.memory[0].kinds["whole"] == gradients + 4 * rows
    assert third.worst.total == pytest.approx(second.worst.total + 1.05 * rows)


def test_what_is_whole_shrinks_with_the_bucket_and_ends_at_all_gradients() -> None:
    def whole(size: int) -> float:
        return planned(f"--ddp-bucket-size {size}", 2).memory[0].kinds["whole"]

    gradients = 4.0 * planned("", 2).blueprint.held(0).parameters
    found = [whole(size) for size in (10**7, 4 * 10**7, 10**10)]
    # and a packed copy of them, of the micro batch before, with the rows that come of it
    assert found == sorted(found) and found[0] < found[1] < found[2] == gradients * (2 + 1 / 8)


def test_stage_3_reads_weights_under_forward_and_backward() -> None:
    second, third = planned("", 2), planned("", 3)
    assert third.hidden_seconds["dp parameters"] > 0 == second.hidden_seconds["dp parameters"]
    slow = planned("", 3, world=512, batch=2048)
    assert slow.seconds["dp communication"] > third.seconds["dp communication"]


def test_weights_are_gathered_as_often_as_they_are_let_go() -> None:
    """Per micro batch, but the first: the head stays; of layers recomputed together all but the last again."""
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
    for flags, more in (("", 0), (f"{full} 1", 0), (f"{full} 4", 24 - 24 // 4)):
        plan = planned(f"--untie-embeddings-and-output-weights {flags}", 3)
        figure, low = plan.blueprint.figure, 2
        sent = passed(
            plan.blueprint, plan.asked.parallel, plan.asked.precision, 0, num_microbatches=4
        )
        layer, layers = figure.layers[0].size, len(figure.layers)
        once = figure.embedding.size + layers * layer + figure.head.size
        assert sent.forward == low * once
        assert sent.backward == low * (layers + more) * layer


def test_a_matrix_of_one_owner_widens_every_share() -> None:
    """Muon's: of a layer of 12 h^2 the largest has 4 h^2, which one of eight ranks has whole."""
    plain, whole = planned("", 3), planned("--optimizer muon", 3)
    weights = [plan.memory[0].kinds["weights"] for plan in (plain, whole)]
    assert weights[1] / weights[0] == pytest.approx(8 * 4 / 12, rel=0.01)


def test_of_owners_of_tables_the_plan_says_that_shares_are_not_even() -> None:
    """Adafactor's at stage 3: an even share is planned, and its owner has the table whole."""
    assert "count yours with --rehearse" in "".join(cautions(planned("--optimizer adafactor", 3)))
    for optimizer, stage in (("adafactor", 2), ("muon", 3), ("adam", 3)):
        assert not list(cautions(planned(f"--optimizer {optimizer}", stage)))
