"""The judgement over beats, with a clock made by hand: who is lost, who hangs, who is let alone."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import replace

import pytest

from megatron_lite.rendezvous.detector import (
    MISSED_BEATS,
    Beat,
    FailureDetector,
    Limits,
    place_of,
    work_of,
)
from megatron_lite.train.ending.faults import _sleep

LIMITS = Limits.from_timeout(600.0)
WAITS = {"place": "megatron_lite/parallel/collectives.py:1 barrier", "waits": True}


class World:
    """Ranks that beat once a second unless told otherwise, as rank `me` sees them."""

    def __init__(self, ranks: int, me: int = 0) -> None:
        self.now = 0.0
        self.beats = {rank: Beat(0) for rank in range(ranks)}
        self.watch = FailureDetector(me, LIMITS)

    def pass_time(self, seconds: int, *, silent: tuple[int, ...] = (), failed: bool = False) -> str:
        """What the watch says in these seconds, "" for nothing."""
        for _ in range(seconds):
            self.now += 1.0
            for rank, beat in self.beats.items():
                if rank not in silent:
                    beat = self.beats[rank] = replace(beat, count=beat.count + 1)
                self.watch.see(rank, beat, self.now)
            said = (self.watch.blame if failed else self.watch.verdict)(self.now)
            if said is not None:
                return said
        return ""

    def say(self, *ranks: int, **changes: object) -> None:
        """The ranks' beats say this from now on."""
        for rank in ranks:
            self.beats[rank] = replace(self.beats[rank], **changes)


def test_limits_follow_the_timeout_and_a_minute_of_silence_is_enough() -> None:
    assert (LIMITS.interval, LIMITS.stale, LIMITS.start) == (1.0, 60.0, 600.0)
    short = Limits.from_timeout(6.0)
    assert (short.interval, short.stale, short.start) == pytest.approx((0.3, 6.0, 6.0))


def test_a_beat_survives_the_store() -> None:
    beat = Beat(3, "train", 7, 2, "there", True)
    assert Beat.from_bytes(beat.to_bytes().encode()) == beat and json.loads(beat.to_bytes())


def test_a_silent_rank_is_lost_after_a_minute_and_before_its_first_step_after_the_timeout() -> None:
    world = World(3)
    world.pass_time(5)
    assert world.pass_time(590, silent=(1,)) == ""
    assert "rank 1 was lost: no sign of life for" in world.pass_time(20, silent=(1,))
    world = World(3)
    world.say(0, 1, 2, step=4, phase="train")
    world.pass_time(5)
    assert world.pass_time(58, silent=(1, 2)) == ""
    said = world.pass_time(5, silent=(1, 2))
    assert said.startswith(
        "ranks 1, 2 were lost: no sign of life for 61.0 s - last finished step 4"
    )


def test_who_was_killed_before_it_said_its_first_step_is_lost_after_a_minute_too() -> None:
    world = World(3)
    world.say(0, phase="train", step=1)
    assert world.pass_time(59, silent=(2,)) == ""
    assert "rank 2 was lost" in world.pass_time(3, silent=(2,))


def test_who_said_goodbye_is_not_lost() -> None:
    world = World(2)
    world.say(0, 1, step=4, phase="train")
    world.pass_time(5)
    world.say(1, phase="ended")
    assert world.pass_time(500, silent=(1,)) == ""
    assert world.watch.all_gone(world.now, silence=60.0)


def test_after_a_failed_collective_a_few_missed_beats_are_enough() -> None:
    world = World(4)
    world.say(0, 1, 2, 3, step=9, phase="train")
    world.pass_time(3)
    world.say(0, phase="failed")
    assert world.pass_time(MISSED_BEATS - 1, silent=(2,), failed=True) == ""
    assert world.pass_time(2, silent=(2,), failed=True).startswith("rank 2 was lost")


def test_a_rank_that_beats_but_does_not_move_while_others_wait_hangs() -> None:
    world = World(3)
    world.say(0, 1, 2, step=4, phase="train", **WAITS)
    world.say(1, place="megatron_lite/train/ending/faults.py:9 _sleep", waits=False)
    world.pass_time(2)
    assert world.pass_time(599) == ""
    said = world.pass_time(5)
    assert said.startswith("rank 1 hangs") and "faults.py:9 _sleep" in said
    assert "--distributed-timeout-minutes" in said


@pytest.mark.parametrize("kind", ["evaluation", "all busy", "all wait", "start", "steps"])
def test_slow_is_not_hanging(kind) -> None:
    """Evaluation ticks; a compile or a save keeps all busy; waiting alone is the group's timeout."""
    world = World(2)
    world.say(0, 1, step=4, phase="train", **WAITS)
    if kind in ("evaluation", "steps"):
        world.say(1, waits=False)
    if kind == "all busy":
        world.say(0, 1, waits=False)
    if kind == "start":  # one call that builds an index for an hour
        world.say(0, 1, phase="start", step=None)
        world.say(1, waits=False)
    for n in range(6):
        world.say(
            1,
            **{"evaluation": {"ticks": n}, "steps": {"step": 5 + n}, "start": {"work": n}}.get(
                kind, {}
            ),
        )
        assert world.pass_time(500) == ""


def test_a_rank_that_stops_working_at_the_start_hangs() -> None:
    """The others wait for the index it builds; neither processor time nor bytes grow any more."""
    world = World(3)
    world.say(0, 1, 2, phase="start", **WAITS)
    world.say(0, place="megatron_lite/data/indices.py:9 blend", waits=False)
    for work in range(4):
        world.say(0, work=work)
        assert world.pass_time(500) == ""
    said = world.pass_time(120)
    assert said.startswith("rank 0 hangs while the others wait") and "indices.py:9" in said


def test_work_is_processor_time_and_bytes() -> None:
    ready, go, over = (threading.Event() for _ in range(3))

    def work() -> None:
        ready.set()
        go.wait()
        end = time.thread_time() + 0.35
        while time.thread_time() < end:
            pass
        over.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait()
    before = work_of(thread.ident)
    time.sleep(0.3)
    assert work_of(thread.ident) == before, "sleeping is no work"
    go.set()
    end = time.monotonic() + 20
    while work_of(thread.ident) < before + 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    over.set()


def test_after_a_timeout_the_rank_that_does_not_wait_is_named() -> None:
    world = World(3)
    world.say(0, 1, 2, step=4, phase="train", **WAITS)
    world.say(2, place="megatron_lite/data/loader.py:7 read", waits=False)
    world.pass_time(2)
    world.say(0, phase="failed")
    assert world.pass_time(30, failed=True).startswith("rank 2 hangs while the others wait")


def test_when_all_are_alive_and_wait_their_places_are_told() -> None:
    world = World(2)
    world.say(0, 1, step=4, phase="train", **WAITS)
    world.say(0, 1, phase="failed")
    said = world.pass_time(60, failed=True)
    assert "though every rank is alive" in said and "rank 1 in megatron_lite/parallel" in said


def test_own_sleep_accuses_nobody() -> None:
    world = World(2)
    world.say(0, 1, step=4, phase="train")
    world.pass_time(5)
    world.now += 1000.0  # a suspended laptop
    world.watch.reset_after_own_stall(world.now)
    assert world.pass_time(30) == ""


def test_the_place_is_the_line_of_ours_and_a_sleep_there_waits_for_nobody() -> None:
    thread = threading.Thread(target=_sleep, args=(0.5,), daemon=True)
    thread.start()
    place, waits = place_of(thread.ident)
    assert re.fullmatch(r"megatron_lite/train/ending/faults.py:\d+ _sleep", place) and not waits
    assert place_of(None) == ("?", False)
