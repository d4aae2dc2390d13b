"""The slow rank is named, memory is that of the kernel's book, stacks come while a rank is stuck."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.telemetry.console import format_record
from megatron_lite.telemetry.ranks import ranks_record
from megatron_lite.telemetry.record import RanksRecord, from_json, record_json
from megatron_lite.train.measuring.reports import OwnTime, memory_report, peak_bytes
from megatron_lite.train.measuring.waits import HostWaits, Waits
from tests.support.launch import TINY, launch, start
from tests.support.sizes import with_flags
from tests.train.runs import alone, records

SLOW = 0.25
LAYOUTS = {
    "dp2": [],
    "tp2": ["--tensor-model-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
}


@pytest.mark.parametrize(
    "layout", ["pp2", *(pytest.param(name, marks=pytest.mark.ci) for name in ("dp2", "tp2"))]
)
def test_the_rank_that_works_longest_is_the_straggler(layout, tmp_path) -> None:
    """All ranks take equally long for a step: only own time tells who keeps the others waiting."""
    flags = ["--log-straggler", "--log-interval", "2", "--train-iters", "3"]
    argv = with_flags(
        TINY, *flags, *LAYOUTS[layout], "--save", str(tmp_path), "--save-interval", "9"
    )
    ended = launch(2, argv, fault=f"step*.forward:1:slow{SLOW}")
    assert [rank.rc for rank in ended] == [0, 0], [rank.err for rank in ended]
    found = [r for r in records(tmp_path) if isinstance(r, RanksRecord)]
    assert [r.iteration for r in found] == [2, 3], "the first step of a process is warm-up"
    for record in found:
        assert list(record.most) == ["1"] and list(record.least) == ["0"]
        assert record.most["1"] > SLOW and record.median == record.least["0"]
    assert re.search(r"straggler: rank 1 \([\d.]+ x\) the median", ended[1].out)


def test_the_straggler_line_to_the_byte() -> None:
    values = [0.0121, 0.0121, 0.25, 0.0119]
    record = ranks_record("own time", values, iteration=7, samples=28, count=2)
    assert from_json(record_json(record)) == record
    assert format_record(record) == (
        " own time per iteration, without waiting for others, of 4 ranks (ms) | median: 12.10"
        " | most: rank 2 250.00, rank 0 12.10 | least: rank 3 11.90, rank 1 12.10 |\n"
        " straggler: rank 2 (20.66 x) the median: all others wait for it in every step"
    )
    even = ranks_record("own time", [1.0, 1.1], iteration=7, samples=28, count=1)
    assert "straggler" not in format_record(even)


def test_waits_are_summed_and_taken() -> None:
    waits = HostWaits()
    ctx = ParallelContext.serial().observed(waits)
    assert all(
        axis.observer is waits for axis in (ctx.tp, ctx.cp, ctx.dp, ctx.pp, ctx.model, ctx.tied)
    )
    assert Axis("tp") == ctx.tp, "who looks is no part of who one is"
    with ctx.dp.observer.waiting():
        sum(range(10_000))
    first = waits.take()
    assert first > 0.0 and waits.take() == 0.0


def test_memory_is_the_kernels_high_water_mark() -> None:
    held = torch.ones(40 << 20, dtype=torch.uint8)  # touched, so that it is resident
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc to compare with")
    (mark,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert peak_bytes(torch.device("cpu")) == pytest.approx(1024 * int(mark), rel=0.02)
    record = memory_report(ParallelContext.serial(), Progress(step=3), count=5)
    assert record.most == record.least and held.numel() < record.median == record.most["0"]
    line = format_record(record)
    assert re.match(
        r" most memory held at once by each of 1 ranks \(MB\) \| median: [\d.]+ \|", line
    )


def test_memory_is_reported_at_its_interval(folder) -> None:
    saving = ["--save", str(folder), "--save-interval", "9"]
    assert alone("--mock-data", "--log-memory-interval", "2", *saving).rc == 0
    found = [r for r in records(folder) if isinstance(r, RanksRecord)]
    assert [(r.what, r.iteration) for r in found] == [("memory", 2), ("memory", 4)]


def test_sigusr2_prints_all_stacks_of_a_rank_that_waits_and_the_run_goes_on() -> None:
    with start(2, TINY, fault="step3:1:sleep4") as running:
        running.wait_for(1, "iteration        2/")
        for rank, place in ((1, "faults.py"), (0, "collectives.py")):
            for _ in range(100):  # until it has got there
                running.kill(rank, signal.SIGUSR2)
                try:
                    running.wait_for(rank, place, stream="err", deadline=0.2)
                    break
                except AssertionError:
                    continue
            said = running.text(rank, "err")
            assert "Current thread 0x" in said and "heartbeat.py" in said, said  # all threads
            assert re.search(rf"{place}\", line \d+ in ", said), said
        ended = running.wait(60)
    assert [rank.rc for rank in ended] == [0, 0], ended


def test_a_rank_that_stays_slow_is_told_of_once() -> None:
    """Without --log-straggler: not of a rank that is slow in one report, not again while it lasts."""

    def report(*seconds: float):
        return ranks_record("own time", seconds, iteration=1, samples=1, count=1)

    own = OwnTime(ParallelContext.serial(), Waits())
    even, slow, other = report(1.0, 1.0, 1.0), report(1.0, 2.0, 1.0), report(2.0, 1.0, 1.0)
    told = [
        own.stays_slow(r)
        for r in (even, slow, even, other, slow, slow, slow, None, even, slow, slow)
    ]
    assert told == [False] * 5 + [True] + [False] * 4 + [True]


def test_who_measures_own_times() -> None:
    asked = {None: [False, True], True: [True, True], False: [False, False]}
    for flag, expected in asked.items():
        assert [TelemetryConfig(log_straggler=flag).watches(n) for n in (1, 2)] == expected
