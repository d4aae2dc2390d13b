"""A timeline: what ran on which rank from when to when; simulated by the planner, recorded by the trainer.

One form for both, so that plan and truth lie side by side: planner/draw.py draws either, and
either is kept as a Chrome trace (chrome://tracing, Perfetto), which parse_trace reads back.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

COMPUTE, WAIT, OPTIMIZER, WEIGHTS, MESSAGE = "compute", "wait", "optimizer", "dW", "message"
"""Kinds of events beside F, B, I and W; WEIGHTS is a weight gradient's product inside a B or a W."""

HOST_SPAN = "optimizer-on-host"
"""Of all that is made and done in host memory beside a device."""

ACTIONS = frozenset({"F", "B", "I", "W"})


class Event(NamedTuple):
    """Something that lasted; seconds from the timeline's begin.

    chunk: which of a rank's stages, counted from 0.
    """

    start: float
    end: float
    kind: str
    name: str
    chunk: int = 0


class Lane(NamedTuple):
    """Events of one rank that share a line: what it computes, or what is in flight on an axis."""

    name: str
    events: tuple[Event, ...]


class Track(NamedTuple):
    """All lanes of one rank; the first is what the rank itself does."""

    name: str
    lanes: tuple[Lane, ...]


class Timeline(NamedTuple):
    """Tracks under a title."""

    title: str
    tracks: tuple[Track, ...]

    @property
    def seconds(self) -> float:
        """From the begin to the last end."""
        return max(
            (e.end for t in self.tracks for lane in t.lanes for e in lane.events), default=0.0
        )


class Hidden(NamedTuple):
    """Seconds that events of a lane were in flight, and those of them in which the rank computed."""

    seconds: float
    under: float


def hidden(track: Track, lane: str, kinds: Collection[str] = ACTIONS, *, of: str = "") -> Hidden:
    """How much of a lane's events lies under the rank's own of these kinds, its waits within them not counted.

    of: how the names of the lane's events begin.
    """
    busy = _union(
        (e.start, e.end)
        for other in track.lanes
        if other.name == lane
        for e in other.events
        if e.name.startswith(of)
    )
    own = track.lanes[0].events
    under = _shared(busy, _union((e.start, e.end) for e in own if e.kind in kinds))
    waited = _shared(under, _union((e.start, e.end) for e in own if e.kind == WAIT))
    return Hidden(_length(busy), _length(under) - _length(waited))


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def _shared(
    some: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """What lies in both; each is in order, and none of its intervals meet."""
    found, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        start = max(some[i][0], others[j][0])
        end = min(some[i][1], others[j][1])
        if start < end:
            found.append((start, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same points of time as intervals that do not meet."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def chrome_trace(timelines: Iterable[Timeline]) -> str:
    """Complete events in microseconds; a process per track, a thread per lane."""
    events: list[dict[str, object]] = []
    titles: list[str] = []
    pid = 0
    for drawn in timelines:
        titles.append(drawn.title)
        for track in drawn.tracks:
            events.append(_named("process_name", pid, 0, track.name))
            for tid, lane in enumerate(track.lanes):
                events.append(_named("thread_name", pid, tid, lane.name))
                events += [
                    {
                        "name": e.name, "cat": e.kind, "ph": "X", "ts": round(e.start * 1e6, 3),
                        "dur": round((e.end - e.start) * 1e6, 3), "pid": pid, "tid": tid,
                        "args": {"chunk": e.chunk},
                    }
                    for e in lane.events
                ]  # fmt: skip
            pid += 1
    return json.dumps(
        {"traceEvents": events, "displayTimeUnit": "ms", "title": "; ".join(titles)},
        separators=(",", ":"),
    )


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, object]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def parse_trace(text: str) -> Timeline:
    """The timeline that chrome_trace wrote; ValueError where the text is none."""
    try:
        found = json.loads(text)
        names: dict[tuple[int, int], str] = {}
        tracks: dict[int, str] = {}
        lanes: dict[tuple[int, int], list[Event]] = {}
        for event in found["traceEvents"]:
            place = int(event["pid"]), int(event["tid"])
            if event["ph"] == "M" and event["name"] == "process_name":
                tracks[place[0]] = str(event["args"]["name"])
            elif event["ph"] == "M":
                names[place] = str(event["args"]["name"])
                lanes.setdefault(place, [])
            elif event["ph"] == "X":
                lanes[place].append(_event(event))
        return Timeline(
            str(found["title"]),
            tuple(
                Track(
                    name, tuple(Lane(names[at], tuple(lanes[at])) for at in lanes if at[0] == pid)
                )
                for pid, name in tracks.items()
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a timeline ({type(error).__name__}: {error})") from None


def _event(found: Mapping[str, object]) -> Event:
    start = float(str(found["ts"])) / 1e6
    args = found["args"]
    assert isinstance(args, dict)
    return Event(
        start, start + float(str(found["dur"])) / 1e6, str(found["cat"]), str(found["name"]),
        int(args["chunk"]),
    )  # fmt: skip
