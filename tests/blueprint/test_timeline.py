"""The form of a timeline: a Chrome trace that is read back."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.timeline import Event, Lane, Timeline, Track, chrome_trace, parse_trace

DRAWN = Timeline(
    "1f1b, 2 ranks",
    (
        Track("pp 0", (Lane("compute", (Event(0.0, 0.5, "F", "0F0"), Event(0.5, 1.25, "B", "0B0"))),
                       Lane("dp", (Event(0.75, 1.5, "message", "all-reduce 1 MB"),)))),
        Track("pp 1", (Lane("compute", (Event(0.25, 1.0, "W", "2W0", 1),)),)),
    ),
)  # fmt: skip


def test_a_trace_gives_the_timeline_back() -> None:
    assert parse_trace(chrome_trace([DRAWN])) == DRAWN
    assert DRAWN.seconds == 1.5


def test_two_lie_below_each_other() -> None:
    both = parse_trace(chrome_trace([DRAWN, DRAWN]))
    assert both.tracks == DRAWN.tracks * 2


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"traceEvents": [{"ph": "X"}], "title": ""}'])
def test_what_is_no_timeline_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="not a timeline"):
        parse_trace(text)
