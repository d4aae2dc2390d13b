"""1.47 billion parameters on one device of 24 GB: Adafactor fits, AdamW does not; planned and rehearsed."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.memory import PlanInputs, memory
from megatron_lite.planner.rehearsed import RehearsedRank, beside_plan
from megatron_lite.rehearsal.rehearse import rehearse

CARD = 24e9
RUN = (
    "--preset macrogpt-1.3b --vocab-size 64076 --make-vocab-size-divisible-by 4 --fp16 --lr 3e-4 "
    "--train-iters 1 --micro-batch-size 4 --global-batch-size 8 --recompute-granularity full "
    "--recompute-method uniform --recompute-num-layers 1 --mock-data"
)


def planned(optimizer, **changes):
    config = parse([*RUN.split(), "--optimizer", optimizer]).config
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))
    blueprint = draw_up(config, 1)
    assert blueprint.num_parameters == 1_473_471_488
    asked = PlanInputs(config.parallel, config.precision, config.train.micro_batch_size)
    return config, blueprint, asked, memory(blueprint, asked)[0]


def test_adafactor_fits_where_adamw_does_not() -> None:
    """Weights 2 bytes, gradients and masters 4, and of a state next to nothing."""
    sizes = {name: planned(name)[3] for name in ("adafactor", "adam8bit", "adam")}
    with_mean = planned("adafactor", adafactor_beta1=0.9)[3]
    assert (
        sizes["adafactor"].total == pytest.approx(18.9e9, rel=0.01)
        and sizes["adafactor"].total < CARD
    )
    assert sizes["adafactor"].kinds["moments"] < 0.01 * 4 * 1_473_471_488
    assert sizes["adam8bit"].kinds["moments"] == pytest.approx(2.03 * 1.473e9, rel=0.01)
    assert sizes["adam8bit"].total < CARD < min(sizes["adam"].total, with_mean.total)
    assert sizes["adam"].kinds["moments"] == 8 * 1_473_471_488


@pytest.mark.ci
def test_a_rehearsal_of_adafactor_has_the_planned_peak() -> None:
    """An update's own tensors among it: of the size of one table at a time."""
    config, blueprint, asked, _ = planned("adafactor")
    (done,) = rehearse(config, 1, [0], workers=1)
    rank = RehearsedRank(done.log.rank, done.memory.kinds(), done.sent_bytes())
    (row,) = beside_plan([rank], blueprint, asked, num_microbatches=2)
    assert row.memory_ratio == pytest.approx(1.0, abs=0.05)
    assert sum(row.memory.values()) < 0.75 * CARD
