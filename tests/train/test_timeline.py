"""--profile-timeline: what every rank did, on one clock, in the form in which plans are drawn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from megatron_lite.blueprint.timeline import ACTIONS, WEIGHTS, Event, Track, hidden, parse_trace
from megatron_lite.parallel.collectives import all_gather, all_reduce, start_reduce_scatter
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.observer import NOBODY, Request
from megatron_lite.telemetry.recorder import Recorder
from megatron_lite.train.measuring.timeline import CollectiveLanes, DeviceClock, RankTimeline, merge
from tests.support.launch import TINY, launch
from tests.support.sizes import with_flags
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, tiny_config

ASKED = ["--profile-timeline", "--profile-step-start", "3", "--profile-step-end", "5"]


def names(track: Track, lane: str = "compute", kinds: frozenset[str] = ACTIONS) -> list[str]:
    return [
        e.name for each in track.lanes if each.name == lane for e in each.events if e.kind in kinds
    ]


def test_a_real_run_leaves_every_action_of_every_rank(tmp_path: Path) -> None:
    words = with_flags(
        [*TINY, *ASKED], "--pipeline-model-parallel-size", "2", "--micro-batch-size", "1",
        "--tensor-model-parallel-size", "2", "--pipeline-schedule", "zb-h1", "--train-iters", "5",
        "--save", str(tmp_path), "--save-interval", "100",
    )  # fmt: skip
    ended = launch(4, words, deadline=90)
    assert [e.rc for e in ended] == [0] * 4, ended[0].err
    timeline = parse_trace((tmp_path / "traces" / "timeline.json").read_text())
    assert timeline.title in ended[0].out and "iterations 3 to 4" in timeline.title
    assert [t.name for t in timeline.tracks] == [
        "pp 0 tp 0 (rank 0)", "pp 0 tp 1 (rank 1)", "pp 1 tp 0 (rank 2)", "pp 1 tp 1 (rank 3)",
    ]  # fmt: skip
    for track in timeline.tracks:
        stage = int(track.name[3])
        each_step = sorted(f"{stage}{op}{m}" for op in "FIW" for m in range(4))
        assert sorted(names(track)) == sorted(each_step * 2)  # two steps of four micro batches
        products = names(track, kinds=frozenset({WEIGHTS}))
        # q with k and v, output, up, down; on the last stage the head
        assert len(products) == 2 * 4 * (4 + stage)
        assert {lane.name for lane in track.lanes} >= {"compute", "tp"}
        events = track.lanes[0].events
        assert any(e.kind == "optimizer" for e in events)
        # a rank does one thing at a time
        own = sorted(e for e in events if e.kind in ACTIONS)
        assert all(a.end <= b.start for a, b in zip(own, own[1:], strict=False))
    # what a stage receives has been computed before: the clocks agree
    first, last = timeline.tracks[0], timeline.tracks[2]
    for m in range(4):
        ends = [e.end for e in first.lanes[0].events if e.name == f"0F{m}"]
        starts = [e.start for e in last.lanes[0].events if e.name == f"1F{m}"]
        assert all(end <= start for end, start in zip(ends, starts, strict=True))


def test_nothing_is_told_or_kept_unless_asked() -> None:
    recorder = Recorder()
    with recorder.span("compute", "F", "0F0"):
        pass
    request = Request("all-reduce", "dp", (0, 1), torch.ones(1), "sum")
    assert CollectiveLanes(recorder).started(request, work=None) is None
    assert recorder.take() == {}
    assert ParallelContext.serial().dp.observer is NOBODY


def _reduce(rank: int, ranks: int) -> dict[str, list[Event]]:
    blueprint = draw(tiny_config(), ranks)
    recorder = Recorder()

    ctx = context(blueprint, rank).observed(CollectiveLanes(recorder))
    recorder.begin()
    x = torch.ones(1000)
    assert all_reduce(x.clone(), ctx.dp)[0] == ranks
    assert all_gather(x, ctx.dp).shape == (ranks * 1000,)
    pending = start_reduce_scatter(x, ctx.dp)
    time.sleep(0.2 * rank)
    pending.wait()
    time.sleep(0.5)
    return recorder.take()


def test_a_collective_lasts_until_it_is_done() -> None:
    for lanes in spawn(_reduce, 2):
        kinds = [event.name for event in lanes["dp"]]
        assert kinds == ["all-reduce 0.004 MB", "all-gather 0.004 MB", "reduce-scatter 0.004 MB"]
        assert all(event.end - event.start < 0.45 for event in lanes["dp"])  # not until take()


def part(name: str, machine: str, aligned: float, *events: Event) -> RankTimeline:
    return RankTimeline(name, machine, aligned, {"compute": list(events)})


def test_another_machines_clock_is_moved_to_the_barrier() -> None:
    parts = [
        part("rank 0", "a", 100.0, Event(101.0, 102.0, "F", "0F0")),
        part("rank 1", "a", 100.1, Event(102.0, 103.0, "B", "0B0")),
        part("rank 2", "b", 7.05, Event(9.0, 10.0, "F", "1F0")),
    ]
    merged = merge([RankTimeline.from_text(p.to_text()) for p in parts], "three")
    starts = [track.lanes[0].events[0].start for track in merged.tracks]
    assert starts == pytest.approx([0.0, 1.0, 9.0 + 93.0 - 101.0])  # medians: 100.05 and 7.05
    assert "2 machines aligned" in merged.title
    assert "aligned" not in merge(parts[:2], "two").title  # one clock: nothing is moved


def test_hidden_is_what_lies_under_computation() -> None:
    lanes = {
        "compute": [
            Event(0.0, 2.0, "F", "0F0"),
            Event(3.0, 4.0, "B", "0B0"),
            Event(2.0, 3.0, "wait", "w"),
        ],
        "dp": [Event(1.0, 3.5, "message", "x"), Event(1.5, 2.5, "message", "y")],
    }
    merged = merge([RankTimeline("rank 0", "a", 0.0, lanes)], "one")
    assert hidden(merged.tracks[0], "dp") == pytest.approx((2.5, 1.5))
    assert "dp collectives 60% under computation" in merged.title
    assert "those of parameters" not in merged.title


def test_what_an_action_waits_for_is_not_hidden_by_it() -> None:
    lanes = {
        "compute": [Event(0.0, 4.0, "F", "0F0"), Event(1.0, 2.0, "wait", "for other ranks")],
        "dp": [
            Event(0.5, 2.0, "message", "all-gather 1 MB"),
            Event(3.0, 6.0, "message", "reduce-scatter 1 MB"),
        ],
    }
    merged = merge([RankTimeline("rank 0", "a", 0.0, lanes)], "one")
    assert hidden(merged.tracks[0], "dp") == pytest.approx((4.5, 1.5))
    assert hidden(merged.tracks[0], "dp", of="all-gather") == pytest.approx((1.5, 0.5))
    assert "dp collectives 33% under computation; those of parameters 33% under" in merged.title


def test_events_at_the_end_are_closed() -> None:
    recorder = Recorder()
    recorder.begin()
    recorder.open("dp", "message", "never done")
    (event,) = recorder.take()["dp"]
    assert event.end >= event.start > 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_devices_clock_measures_the_device() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    recorder = Recorder()
    recorder.begin(DeviceClock())
    began = time.monotonic()
    with recorder.span("compute", "F", "0F0"):
        for _ in range(20):
            x @ x
    torch.cuda.synchronize()
    passed = time.monotonic() - began
    (event,) = recorder.take()["compute"]
    assert abs(event.start - began) < 0.05 and 0.5 * passed < event.end - event.start < 1.1 * passed
