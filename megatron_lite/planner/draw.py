"""Timelines as text, as SVG and as a Chrome trace: a plan's, and a real one below it."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from megatron_lite.blueprint.schedules.actions import Op
from megatron_lite.blueprint.timeline import (
    ACTIONS,
    COMPUTE,
    MESSAGE,
    OPTIMIZER,
    WAIT,
    WEIGHTS,
    Event,
    Lane,
    Timeline,
    Track,
    chrome_trace,
)
from megatron_lite.planner import statement
from megatron_lite.planner.forecast import Forecast, simulate_step

_COLORS = {
    Op.F.value: "#4f81bd", Op.B.value: "#9bbb59", Op.I.value: "#76b7b2", Op.W.value: "#c3a05e",
    OPTIMIZER: "#8064a2", WEIGHTS: "#5e7530", MESSAGE: "#d98880", WAIT: "#e4e4e4", COMPUTE: "#bbbbbb",
}  # fmt: skip
_LEGEND = {
    Op.F.value: "forward", Op.B.value: "backward", Op.I.value: "I, input gradient",
    Op.W.value: "W, weight gradients", WEIGHTS: "one weight gradient", OPTIMIZER: "optimizer",
    MESSAGE: "in flight to other ranks", WAIT: "waits",
}  # fmt: skip
_WIDTH = 120
_LEFT, _TRACK, _LANE = 150, 22, 9


def timeline(plan: Forecast, num_microbatches: int) -> Timeline:
    """The plan's schedule of so many micro batches in virtual time."""
    num, pp = num_microbatches, plan.blueprint.grid.pp
    if plan.blueprint.schedule == "interleaved":
        num = -(-num // pp) * pp
    simulation = simulate_step(plan.costs, num)
    title = (
        f"{plan.blueprint.schedule}, pp {pp}, {_drawn(plan, num)}, "
        f"{statement.machines(plan.cluster)}, {plan.asked.precision.products}: "
        f"{simulation.makespan * 1e3:,.1f} ms, bubble {simulation.bubble:.1%}"
    )
    tracks = []
    for rank, row in enumerate(simulation.spans):
        events = tuple(
            Event(start, end, action.op.value, str(action), action.stage // pp)
            for start, end, action in row
        )
        tracks.append(Track(f"pp {rank:>2}", (Lane(COMPUTE, events),)))
    return Timeline(title, tuple(tracks))


def _drawn(plan: Forecast, num: int) -> str:
    """How many micro batches, of which size, and how many a step has where not all are drawn."""
    whole, length = plan.blueprint.microbatches(), plan.blueprint.model.seq_length
    count = f"{num} of {whole:,}" if num < whole else f"{num}"
    return f"{count} micro batches of {plan.asked.micro_batch_size} x {length:,}"


def timeline_text(drawn: Sequence[Timeline], *, width: int = _WIDTH) -> str:
    """A line per lane, a column per equal piece of time: F forward, B backward, I, W, . idle, = in flight."""
    return "\n".join(line for each in drawn for line in _text(each, width))


def _text(drawn: Timeline, width: int) -> list[str]:
    lines, total = [drawn.title], drawn.seconds or 1.0
    for track in drawn.tracks:
        for number, lane in enumerate(track.lanes):
            cells = ["."] * width
            for event in lane.events:
                if number == 0 and event.kind not in ACTIONS | {OPTIMIZER}:
                    continue
                first = round(event.start / total * width)
                last = max(round(event.end / total * width), first + 1)
                label = _label(event) if number == 0 else ""
                fill = "-" if number == 0 else "="
                for at in range(first, min(last, width)):
                    cells[at] = label[at - first] if at - first < len(label) else fill
            name = track.name if number == 0 else f"  {lane.name}"
            lines.append(f"{name} |{''.join(cells)}|")
    wide = max(line.index("|") for line in lines[1:]) if len(lines) > 1 else 0
    return [
        lines[0],
        *(line.replace("|", " " * (wide - line.index("|")) + "|", 1) for line in lines[1:]),
    ]


def _label(event: Event) -> str:
    """F3 of 2F3; the optimizer is O."""
    if event.kind not in ACTIONS:
        return event.kind[0].upper()
    return event.kind + event.name.rpartition(event.kind)[2]


def as_svg(drawn: Sequence[Timeline], *, width: int = 1400) -> str:
    """A picture of its own, each timeline in its own scale; hovering names an event and its time."""
    body: list[str] = []
    y = 6
    for each in drawn:
        y = _draw(each, body, y, width)
    kinds = [k for k in _LEGEND if any(e.kind == k for each in drawn for e in _events(each))]
    x = _LEFT
    for kind in kinds:
        body.append(f'<rect x="{x}" y="{y + 3}" width="10" height="10" fill="{_COLORS[kind]}"/>')
        body.append(f'<text x="{x + 14}" y="{y + 12}">{_LEGEND[kind]}</text>')
        x += 30 + 6 * len(_LEGEND[kind])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + _LEFT + 10}" height="{y + 24}" '
        'font-family="sans-serif" font-size="11">'
    )
    return (
        "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"
    )


def _events(drawn: Timeline) -> list[Event]:
    return [event for track in drawn.tracks for lane in track.lanes for event in lane.events]


def _draw(drawn: Timeline, body: list[str], y: int, width: int) -> int:
    """Append one timeline from y down; returns where it ends."""
    total = drawn.seconds or 1.0
    body.append(f'<text x="{_LEFT}" y="{y + 14}" font-size="14">{escape(drawn.title)}</text>')
    y += 24
    for track in drawn.tracks:
        body.append(f'<text x="8" y="{y + 15}">{escape(track.name)}</text>')
        for number, lane in enumerate(track.lanes):
            height = _TRACK if number == 0 else _LANE
            if number:
                body.append(
                    f'<text x="{_LEFT - 6}" y="{y + 8}" font-size="8" text-anchor="end">'
                    f"{escape(lane.name)}</text>"
                )
            for event in lane.events:
                body += _boxes(event, _LEFT + event.start / total * width, y, height, width / total)
            y += height + 1
        y += 4
    return y + 8


def _boxes(event: Event, x: float, y: int, height: int, scale: float) -> list[str]:
    """The event's box with its name, and its label where there is room."""
    wide = (event.end - event.start) * scale
    if event.kind == WEIGHTS:  # inside the action that holds it
        y, height = y + height - 5, 5
    shade = 0.6 if event.chunk % 2 else 1.0
    border = ' stroke="white" stroke-width="0.5"' if event.kind in ACTIONS else ""
    boxes = [
        f'<rect x="{x:.1f}" y="{y}" width="{max(wide, 0.3):.1f}" height="{height}" '
        f'fill="{_COLORS.get(event.kind, "#bbbbbb")}" fill-opacity="{shade}"{border}>'
        f"<title>{escape(event.name)} {event.start * 1e3:.2f}-{event.end * 1e3:.2f} ms</title></rect>"
    ]
    if event.kind in ACTIONS and wide > 14:
        label = event.name.rpartition(event.kind)[2]
        boxes.append(f'<text x="{x + 2:.1f}" y="{y + 14}">{escape(label)}</text>')
    return boxes


def as_chrome_trace(drawn: Sequence[Timeline]) -> str:
    """For chrome://tracing and Perfetto, all timelines one below the other."""
    return chrome_trace(drawn)
