"""Spans count what they should, and cost nothing when they are off."""

from __future__ import annotations

from typing import NoReturn

import pytest

from megatron_lite.telemetry.console import format_record
from megatron_lite.telemetry.timers import Timers, format_times, timing_record


class Clock:
    """A clock that moves when told, and a device whose work takes time to wait for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pending = 0.0
        self.waits = 0

    def __call__(self) -> float:
        return self.now

    def wait(self) -> None:
        self.waits += 1
        self.now += self.pending
        self.pending = 0.0


def test_spans_of_one_name_add_up_until_taken() -> None:
    clock = Clock()
    timers = Timers(0, clock=clock)
    for seconds in (1.0, 2.0):
        with timers.span("interval-time", level=0):
            clock.now += seconds
    assert timers.take() == {"interval-time": 3.0}
    assert timers.take() == {}


def test_level_zero_never_waits_for_the_device() -> None:
    clock = Clock()
    timers = Timers(0, wait=clock.wait, clock=clock)
    with timers.span("interval-time", level=0), timers.span("optimizer", level=1):
        clock.pending += 5.0
    assert clock.waits == 0
    assert timers.take() == {"interval-time": 0.0}


def test_level_one_sees_the_devices_work_of_its_block_only() -> None:
    clock = Clock()
    timers = Timers(1, wait=clock.wait, clock=clock)
    clock.pending = 7.0
    with timers.span("optimizer", level=1):
        clock.pending = 5.0
    assert timers.take() == {"optimizer": 5.0}


def test_a_block_that_fails_is_counted_and_its_error_passes() -> NoReturn:
    clock = Clock()
    timers = Timers(0, clock=clock)
    with pytest.raises(ValueError, match="out"), timers.span("interval-time", level=0):
        clock.now += 1.0
        raise ValueError("out")
    assert timers.take() == {"interval-time": 1.0}


GATHERED = [
    {"forward-backward": 2.0, "optimizer": 0.5},
    {"forward-backward": 1.0, "optimizer": 0.25, "embedding-grads-all-reduce": 0.1},
]


def test_minmax_is_megatrons_form() -> None:
    assert format_times(GATHERED, option="minmax", iterations=2) == "\n".join(
        [
            "(min, max) time across ranks (ms):",
            "    forward-backward ...............................: (500.00, 1000.00)",
            "    optimizer ......................................: (125.00, 250.00)",
            "    embedding-grads-all-reduce .....................: (50.00, 50.00)",
        ]
    )


def test_the_timing_record_prints_as_the_gathered_times() -> None:
    record = timing_record(GATHERED, iteration=10, samples=80, iterations=2)
    assert record.smallest == {
        "forward-backward": 0.5,
        "optimizer": 0.125,
        "embedding-grads-all-reduce": 0.05,
    }
    assert format_record(record) == format_times(GATHERED, option="minmax", iterations=2)


def test_max_and_all() -> None:
    assert format_times(GATHERED[:1], option="max").splitlines()[1] == (
        "    forward-backward ...............................: 2000.00"
    )
    assert format_times(GATHERED, option="all").splitlines()[:4] == [
        "times across ranks (ms):",
        "  forward-backward:",
        "     rank  0: 2000.00",
        "     rank  1: 1000.00",
    ]


def test_nothing_measured_prints_nothing() -> None:
    assert format_times([{}, {}], option="minmax") == ""
