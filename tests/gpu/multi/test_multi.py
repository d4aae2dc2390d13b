"""Several GPUs equal one: losses of layouts, traffic, checkpoints across layouts, a lost rank.

`make test-gpu` on a machine with two or more GPUs (8 for all); every body runs on gloo, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.launch import stop_process_group
from megatron_lite.telemetry.record import StepRecord, read_metrics
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.gpu.multi.place import GLOO, join, places, tool_flags
from tests.parity.kinds import (
    BF16,
    CHUNKS2,
    EVERY_LAYER,
    LAYERS8,
    OVERLAP_GATHER,
    SP,
    ZB_H1,
    ZB_V,
    ZERO,
    layout,
)
from tests.support.launch import TINY, Ended, launch, start
from tests.support.sizes import with_flags
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config
from tests.support.traffic import traffic

LAYOUTS = [
    layout("tp2", tp=2),
    layout("tp2-sp", tp=2, **SP),
    layout("pp2", pp=2),
    layout("pp2-interleaved", pp=2, **CHUNKS2),
    layout("pp2-zb-h1", pp=2, **ZB_H1),
    layout("pp2-zb-v", pp=2, **ZB_V),
    layout("dp2", dp=2),
    layout("dp2-zero-overlap", dp=2, parallel__ddp_bucket_size=3000, **ZERO, **OVERLAP_GATHER),
    layout("dp2-stage2", dp=2, parallel__ddp_bucket_size=3000, parallel__zero_stage=2),
    layout("dp2-stage3", dp=2, parallel__zero_stage=3),
    layout("dp2-stage3-bf16-recompute", dp=2, shared=BF16, parallel__zero_stage=3, **EVERY_LAYER),
    layout("tp2-pp2-dp2-sp-stage3", tp=2, pp=2, dp=2, parallel__zero_stage=3, **SP),
    layout("dp2-zero-bf16", dp=2, shared=BF16, **ZERO),
    layout("pp4-interleaved", pp=4, shared=LAYERS8, **CHUNKS2),
    layout("tp2-dp2-sp-zero", tp=2, dp=2, **SP, **ZERO),
    layout("tp2-pp2-dp2-sp-zero-overlap", tp=2, pp=2, dp=2, **SP, **ZERO, **OVERLAP_GATHER),
]
TRIED = [row for row in LAYOUTS if row.name in ("tp2-sp", "pp2-zb-v", "dp2-zero-overlap")]
"""On gloo tests/parity has them all; these show that the bodies of this file work."""


def curve(ctx_of: Any, changes: dict[str, Any], ranks: int) -> list[float]:
    """Losses and gradient norms of five steps."""
    config = tiny_config(model__hidden_dropout=0.1, **changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, ctx_of(blueprint))
    seen = []
    for step in range(5):
        run.progress.step = step
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
        result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
        seen += [result.loss.item(), result.update.grad_norm.item()]
    return seen


def both_curves(
    rank: int, ranks: int, place: str, shared: dict[str, Any], changes: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """This rank's curve in the layout, and that of its device alone."""
    device = join(place)
    ours = curve(lambda blueprint: context(blueprint, rank, device), shared | changes, ranks)
    alone = curve(lambda _: ParallelContext.serial(device), shared, 1)
    stop_process_group()
    return ours, alone


@pytest.mark.parametrize(
    "place, row",
    [
        place
        for row in LAYOUTS
        for place in places(row.ranks, row.name, row, twin="ci" if row in TRIED else "slow")
    ],
)
def test_a_layout_has_the_losses_of_one_device(place: str, row: Any) -> None:
    within = 2e-2 if "bf16" in row.name else 1e-4
    curves = spawn(both_curves, row.ranks, place, row.shared, row.changes, join=False)
    for ours, alone in curves:
        assert ours == pytest.approx(alone, rel=within)
    assert all(ours == curves[0][0] for ours, _ in curves), "the ranks disagree"


def counted(rank: int, ranks: int, place: str, changes: dict[str, Any]) -> dict[Any, int]:
    """The messages of one step: (collective, bytes) -> how often."""
    device = join(place)
    seen, _ = traffic(rank, ranks, changes, device)
    stop_process_group()
    return dict(seen)


@pytest.mark.parametrize("place", places(2, "traffic"))
def test_messages_are_those_of_the_formulas(place: str) -> None:
    """tests/parallel/test_traffic.py holds gloo against the formulas; here every place against gloo."""
    for row in TRIED:
        changes = row.changes | {"train__global_batch_size": 8}
        there = spawn(counted, 2, place, changes, join=False)
        assert there == spawn(traffic_on_gloo, 2, changes), row.name


def traffic_on_gloo(rank: int, ranks: int, changes: dict[str, Any]) -> dict[Any, int]:
    return dict(traffic(rank, ranks, changes)[0])


def trained(place: str, ranks: int, *words: str) -> list[Ended]:
    ended = launch(ranks, with_flags(TINY, *tool_flags(place), *words), deadline=180)
    assert [rank.rc for rank in ended] == [0] * ranks, ended[0].err[-2000:]
    return ended


def state_hash(ended: list[Ended]) -> str:
    (found,) = re.findall(r"state hash at iteration \d+: (\w{64})", ended[0].out)
    return found


def losses(folder: Path) -> list[float]:
    records = read_metrics(folder / "metrics.jsonl")
    return [record.loss for record in records if isinstance(record, StepRecord)]


@pytest.mark.parametrize("place", places(2, "reshard"))
def test_a_checkpoint_of_one_layout_is_loaded_by_another(place: str, tmp_path: Path) -> None:
    """Saved at tp 2 with sequence parallelism, loaded at dp 2 with the distributed optimizer."""
    whole, first = tmp_path / "whole", tmp_path / "first"
    tp = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    zero = ["--use-distributed-optimizer"]
    keep = ["--print-state-hash", "--save-interval", "3", "--save"]
    trained(place, 2, *tp, *keep, str(whole))
    saved = trained(place, 2, *tp, *keep, str(first), "--exit-interval", "3")
    looked = trained(place, 2, *zero, "--load", str(first), "--skip-train", "--print-state-hash")
    assert state_hash(looked) == state_hash(saved), "weights and moments, to the last bit"
    trained(place, 2, *zero, *keep, str(first), "--load", str(first))
    assert losses(first) == pytest.approx(losses(whole), rel=1e-4)
    assert len(losses(first)) == 6


LOST = {
    "tp": ("step3.forward:1:sigkill", ["--tensor-model-parallel-size", "2"]),
    "pp": ("step3.backward:1:sigkill", ["--pipeline-model-parallel-size", "2"]),
    "dp": ("step3.reduce:1:sigstop", []),
}


@pytest.mark.parametrize(
    "place, name",
    [
        place
        for name in LOST
        for place in places(2, f"lost-{name}", name, twin="slow" if name == "dp" else "ci")
    ],
)
def test_a_lost_rank_is_named_in_time(place: str, name: str) -> None:
    fault, flags = LOST[name]
    timed = with_flags(TINY, *tool_flags(place), *flags, "--distributed-timeout-minutes", "0.2")
    stopped = [1] if "sigstop" in fault else []
    survivor = start(2, timed, fault=fault).wait(90 if place == GLOO else 180, stopped=stopped)[0]
    assert survivor.rc == 6, survivor.err[-2000:]
    assert re.match(r"FATAL\[6\] rank=0 step=[23]: rank 1 was lost", survivor.fatal), survivor.fatal
