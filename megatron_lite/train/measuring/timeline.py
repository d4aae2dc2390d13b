"""--profile-timeline: the steps of --profile-step-start to --profile-step-end as one timeline of all ranks.

Every rank records what it does (actions, waits, optimizer) and what it has in flight (collectives,
by axis, from being issued to being done); rank 0 puts them together and writes the file, which
`tools/plan.py --draw ... --beside FILE` draws below the plan of the same run.

Clocks: the processes of a machine share one.  Another machine's is shifted so that its ranks leave
the barrier before the first step when those of rank 0's machine do: right to a fraction of a
millisecond, the barrier's own spread.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lite.blueprint.timeline import (
    COMPUTE,
    MESSAGE,
    WAIT,
    WEIGHTS,
    Event,
    Lane,
    Timeline,
    Track,
    chrome_trace,
    hidden,
)
from megatron_lite.config.errors import StorageError
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.parallel.collectives import barrier, gather_text
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.observer import Observer, Request
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.telemetry.recorder import Clock, HostClock, Recorder

FILE = "timeline.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class DeviceClock:
    """For a GPU: events on its streams, placed on the host's clock by one that both have seen."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._zero = self.mark()
        torch.cuda.synchronize()
        self._host = time.monotonic()

    def mark(self) -> object:
        """When the current stream gets here."""
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def seconds(self, mark: object) -> float:
        """Waits for the device."""
        assert isinstance(mark, torch.cuda.Event) and isinstance(self._zero, torch.cuda.Event)
        mark.synchronize()
        return self._host + self._zero.elapsed_time(mark) / 1e3


class CollectiveLanes(Observer):
    """Records each collective from its start until it is done, on the lane of its axis."""

    follows = True

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def started(self, request: Request, work: Any) -> Callable[[], None] | None:
        """Gloo's reduce-scatter does not say when it is done: it ends when it has been waited for."""
        if not self._recorder.recording:
            return None
        size = f"{request.own_bytes / 1e6:.3g} MB"
        end = self._recorder.open(request.axis, MESSAGE, f"{request.op} {size}")
        try:
            work.get_future().then(lambda _: end())
        except RuntimeError:  # "Work::getFuture not implemented"
            return end
        return None

    def waiting(self, what: str = "") -> AbstractContextManager[object]:
        """Each wait for other ranks as one, inside the action that waits."""
        return self._recorder.span(COMPUTE, WAIT, what or "for other ranks")


class RankTimeline(NamedTuple):
    """One rank's share of a timeline.

    machine: the same for the ranks of one machine; aligned: when this rank left the barrier.
    """

    name: str
    machine: str
    aligned: float
    lanes: Mapping[str, Sequence[Event]]

    def to_text(self) -> str:
        """As sent to rank 0."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: str) -> RankTimeline:
        """What to_text gave."""
        name, machine, aligned, lanes = json.loads(text)
        return cls(name, machine, aligned, {k: [Event(*e) for e in v] for k, v in lanes.items()})


def merge(parts: Sequence[RankTimeline], title: str) -> Timeline:
    """All ranks on one clock that begins with the first event; the title says how much was hidden."""
    shift = _shifts(parts)
    begin = min(
        (e.start + shift[p.machine] for p in parts for events in p.lanes.values() for e in events),
        default=0.0,
    )
    tracks = []
    for part in sorted(parts, key=lambda part: [int(n) for n in re.findall(r"\d+", part.name)]):
        by = shift[part.machine] - begin
        order = sorted(part.lanes, key=lambda name: (name != COMPUTE, name))
        lanes = (
            Lane(n, tuple(e._replace(start=e.start + by, end=e.end + by) for e in part.lanes[n]))
            for n in order
        )
        tracks.append(Track(part.name, tuple(lanes)))
    merged = Timeline(title, tuple(tracks))
    words = [f"{title}: {merged.seconds * 1e3:,.1f} ms", *_hidden(merged)]
    if len(shift) > 1:
        words.append(f"clocks of {len(shift)} machines aligned at a barrier")
    return merged._replace(title="; ".join(words))


def _shifts(parts: Sequence[RankTimeline]) -> dict[str, float]:
    """Machine -> seconds to add to its clock."""
    left: dict[str, list[float]] = {}
    for part in parts:
        left.setdefault(part.machine, []).append(part.aligned)
    middles = {machine: statistics.median(times) for machine, times in left.items()}
    first = middles[parts[0].machine]
    return {machine: first - middle for machine, middle in middles.items()}


def _hidden(merged: Timeline) -> list[str]:
    said = []
    for what, of in (("dp collectives", ""), ("those of parameters", "all-gather")):
        flying = [hidden(track, "dp", of=of) for track in merged.tracks]
        if total := sum(each.seconds for each in flying):
            share = sum(each.under for each in flying) / total
            said.append(f"{what} {share:.0%} under computation")
    covered = sum(hidden(track, "tp", {WEIGHTS}).under for track in merged.tracks)
    products = [e for t in merged.tracks for e in t.lanes[0].events if e.kind == WEIGHTS]
    if covered:
        share = covered / sum(e.end - e.start for e in products)
        said.append(f"{share:.0%} of the weight gradients over tp collectives")
    return said


@dataclass(slots=True)
class StepRecording:
    """Records the profiled steps on this rank; before() and after() are collective where it is due."""

    telemetry: TelemetryConfig
    ctx: ParallelContext
    folder: Path
    title: str
    recorder: Recorder = field(default_factory=Recorder)
    _aligned: float = 0.0
    _first: int = 0

    def before(self, step: int) -> None:
        """Begin if this step is the first profiled one."""
        if not self.telemetry.profile_timeline or step != self.telemetry.profile_step_start:
            return
        on_gpu = self.ctx.device.type == "cuda"
        barrier(self.ctx.world)
        if on_gpu:
            torch.cuda.synchronize()
        self._aligned, self._first = time.monotonic(), step
        clock: Clock = DeviceClock() if on_gpu else HostClock()
        self.recorder.begin(clock)

    def after(self, step: int, *, last: bool) -> tuple[str, ...]:
        """Write after the last profiled step, or the run's last; returns what to say about it."""
        if not self.recorder.recording or not (last or step + 1 >= self.telemetry.profile_step_end):
            return ()
        lanes = self.recorder.take()
        mine = RankTimeline(_name(self.ctx), _machine(), self._aligned, lanes)
        texts = gather_text(mine.to_text(), self.ctx.world, self.ctx.device)
        if self.ctx.rank != 0:
            return ()
        steps = (
            f"iteration {step}" if step == self._first else f"iterations {self._first} to {step}"
        )
        merged = merge([RankTimeline.from_text(text) for text in texts], f"{self.title}, {steps}")
        disk, path = Disk(), self.folder / FILE
        try:
            disk.make_folder(self.folder)
            write_atomically(path, chrome_trace([merged]).encode(), disk)
        except StorageError as error:  # the steps it shows are done
            return (f" > timeline of {merged.title}; WARNING: it is lost: {error}",)
        return (f" > timeline of {merged.title}; written to {path}",)


def _name(ctx: ParallelContext) -> str:
    """pp first, so that sorted tracks show a pipeline from top to bottom."""
    places = [
        f"{axis.name} {axis.rank}" for axis in (ctx.pp, ctx.dp, ctx.cp, ctx.tp) if axis.size > 1
    ]
    return f"{' '.join(places)} (rank {ctx.rank})" if places else f"rank {ctx.rank}"


def _machine() -> str:
    with suppress(OSError):
        return _BOOT.read_text(encoding="ascii").strip()
    return platform.node()
