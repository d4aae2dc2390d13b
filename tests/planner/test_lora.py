"""A frozen base costs its weights alone: a 7B with adapters of rank 16 fits a card of 24 GB."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.blueprint.schedules.actions import Op
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.planner.cost import Costs
from megatron_lite.planner.hardware import Cluster, find_device
from megatron_lite.planner.memory import PlanInputs, RankMemory, memory
from megatron_lite.rehearsal.rehearse import rehearse

SEVEN = (
    "--preset llama2-7b --seq-length 2048 --micro-batch-size 1 --global-batch-size 1 --train-iters 10 "
    "--lr 1e-4 --bf16 --mock-data --eval-iters 0 --dry-run"
)
ADAPTERS = f"{SEVEN} --lora-rank 16"
MLP_AGAIN = " --recompute-granularity selective --recompute-modules mlp layernorm"
EVERY_LAYER = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
IN_4_BITS = " --lora-base nf4"
CARD = 24e9
"""Bytes of a card that is sold as one of 24 GB, or a little more."""


def asked(config: RunConfig) -> PlanInputs:
    return PlanInputs.of(config.parallel, config.precision, config.train, config.data, on_gpu=True)


def planned(flags: str) -> RankMemory:
    config = parse(flags.split()).config
    (rank,) = memory(draw_up(config, 1), asked(config))
    return rank


def test_a_frozen_base_has_no_gradients_masters_or_moments() -> None:
    whole, beside = planned(SEVEN), planned(ADAPTERS)
    trained = 39_976_960
    assert beside.parameters - whole.parameters == trained
    assert beside.kinds["gradients"] == beside.kinds["masters"] == 4 * trained
    assert beside.kinds["moments"] == 8 * trained
    assert whole.kinds["moments"] == 8 * whole.parameters
    assert beside.kinds["weights"] == 2 * beside.parameters


@pytest.mark.parametrize("again", [MLP_AGAIN, EVERY_LAYER], ids=["mlp again", "every layer again"])
def test_7b_is_planned_to_fit_24_gb(again: str) -> None:
    assert planned(ADAPTERS + again).total < CARD
    assert planned(SEVEN + again).total > 4 * CARD, "which all of it does not"


def test_a_base_in_4_bits_costs_4_and_a_half() -> None:
    """Matrices of the layers alone; and the time of unpacking them, forward and backward."""
    whole, packed = planned(ADAPTERS), planned(ADAPTERS + IN_4_BITS)
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert whole.kinds["weights"] - packed.kinds["weights"] == matrices * (2 - 4.5 / 8)
    for kind in ("gradients", "masters", "moments"):
        assert packed.kinds[kind] == whole.kinds[kind]
    cluster = Cluster(device=find_device("h100"), world_size=1, devices_per_node=8)
    seconds = []
    for flags in (ADAPTERS, ADAPTERS + IN_4_BITS):
        config = parse(flags.split()).config
        costs = Costs(draw_up(config, 1), asked(config), cluster)
        seconds.append(costs.work(Op.F, costs.blueprint.stages[0]).seconds)
    expected = cluster.device.moving_seconds(matrices * (2 + 4.5 / 8))
    assert seconds[1] - seconds[0] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    ["", MLP_AGAIN, IN_4_BITS, MLP_AGAIN + IN_4_BITS, EVERY_LAYER + IN_4_BITS,
     f"{EVERY_LAYER} --lora-variant dora"],
    ids=["kept", "mlp again", "nf4", "nf4 mlp again", "nf4 every layer again", "dora"],
)  # fmt: skip
def test_7b_is_rehearsed_as_planned(more: str) -> None:
    plan, config = planned(ADAPTERS + more), parse((ADAPTERS + more).split()).config
    (done,) = rehearse(config, 1, [0], workers=1)
    assert done.memory is not None and done.log.failed_at is None
    assert done.memory.peak == pytest.approx(plan.allocated, rel=0.02)
    assert done.memory.peak < (CARD if more else 1.02 * CARD)
