"""A frozen base costs its weights alone: a 7B with adapters of rank 16 fits a card of 24 GB."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.memory import PlanInputs, RankMemory, memory
from megatron_lite.rehearsal.rehearse import rehearse

SEVEN = (
    "--preset llama2-7b --seq-length 2048 --micro-batch-size 1 --global-batch-size 1 --train-iters 10 "
    "--lr 1e-4 --bf16 --mock-data --eval-iters 0 --dry-run"
)
ADAPTERS = f"{SEVEN} --lora-rank 16"
MLP_AGAIN = " --recompute-granularity selective --recompute-modules mlp layernorm"
EVERY_LAYER = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
CARD = 24e9
"""Bytes of a card that is sold as one of 24 GB, or a little more."""


def planned(flags: str) -> RankMemory:
    config = parse(flags.split()).config
    asked = PlanInputs.of(config.parallel, config.precision, config.train, config.data, on_gpu=True)
    (rank,) = memory(draw_up(config, 1), asked)
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


@pytest.mark.slow
@pytest.mark.parametrize("again", ["", MLP_AGAIN], ids=["kept", "mlp again"])
def test_7b_is_rehearsed_as_planned(again: str) -> None:
    plan, config = planned(ADAPTERS + again), parse((ADAPTERS + again).split()).config
    (done,) = rehearse(config, 1, [0], workers=1)
    assert done.memory is not None and done.log.failed_at is None
    assert done.memory.peak == pytest.approx(plan.allocated, rel=0.02)
    assert done.memory.peak < (CARD if again else 1.02 * CARD)
