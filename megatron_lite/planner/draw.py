"""The timeline of a schedule as text, as SVG and as a Chrome trace (chrome://tracing, Perfetto)."""

from __future__ import annotations

import json
from typing import NamedTuple
from xml.sax.saxutils import escape

from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.blueprint.schedules.simulate import Simulation
from megatron_lite.planner.forecast import Forecast, simulate_step

_COLORS = {Op.F: "#4f81bd", Op.B: "#9bbb59", Op.I: "#76b7b2", Op.W: "#c3a05e"}
_WIDTH = 120


class Timeline(NamedTuple):
    """A simulation with its title; chunks: stages per pipeline rank."""

    title: str
    simulation: Simulation
    num_ranks: int


def timeline(plan: Forecast, num_microbatches: int) -> Timeline:
    """The plan's schedule of so many micro batches in virtual time."""
    num = num_microbatches
    if plan.blueprint.schedule == "interleaved":
        num = -(-num // plan.blueprint.grid.pp) * plan.blueprint.grid.pp
    simulation = simulate_step(plan.costs, num)
    title = (
        f"{plan.blueprint.schedule}, pp {plan.blueprint.grid.pp}, {num} micro batches: "
        f"{simulation.makespan * 1e3:,.1f} ms, bubble {simulation.bubble:.1%}"
    )
    return Timeline(title, simulation, plan.blueprint.grid.pp)


def as_text(drawn: Timeline, *, width: int = _WIDTH) -> str:
    """One line per pipeline rank, a column per equal piece of time: F forward, B backward, I, W, . idle."""
    spans, total = drawn.simulation.spans, drawn.simulation.makespan
    lines = [drawn.title]
    for rank, row in enumerate(spans):
        cells = ["."] * width
        for start, end, action in row:
            first, last = round(start / total * width), round(end / total * width)
            label = f"{action.op.value}{action.microbatch}"
            for at in range(first, max(last, first + 1)):
                if at < width:
                    cells[at] = label[at - first] if at - first < len(label) else "-"
        lines.append(f"pp {rank:>2} |{''.join(cells)}|")
    return "\n".join(lines)


def as_svg(drawn: Timeline, *, width: int = 1400, row_height: int = 26) -> str:
    """A picture of its own; hovering names the action and its time."""
    total, ranks = drawn.simulation.makespan, drawn.num_ranks
    left, top = 60, 34
    height = top + ranks * row_height + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + left + 10}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{escape(drawn.title)}</text>',
    ]
    for rank, row in enumerate(drawn.simulation.spans):
        y = top + rank * row_height
        parts.append(f'<text x="8" y="{y + 16}">pp {rank}</text>')
        for start, end, action in row:
            x, wide = left + start / total * width, (end - start) / total * width
            shade = 1.0 if action.stage < ranks else 0.6
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{row_height - 4}" '
                f'fill="{_COLORS[action.op]}" fill-opacity="{shade}" stroke="white" '
                f'stroke-width="0.5"><title>{_name(action)} {start * 1e3:.2f}-{end * 1e3:.2f} ms'
                "</title></rect>"
            )
            if wide > 14:
                parts.append(f'<text x="{x + 2:.2f}" y="{y + 15}">{action.microbatch}</text>')
    y = top + ranks * row_height + 16
    for n, (op, color) in enumerate(_COLORS.items()):
        parts.append(
            f'<rect x="{left + n * 60}" y="{y - 9}" width="10" height="10" fill="{color}"/>'
        )
        parts.append(f'<text x="{left + n * 60 + 14}" y="{y}">{op.value}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def as_chrome_trace(drawn: Timeline) -> str:
    """Complete events in microseconds; a process per pipeline rank, so that a real trace lies beside it."""
    events: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"pp {rank}"}}
        for rank in range(drawn.num_ranks)
    ]
    for rank, row in enumerate(drawn.simulation.spans):
        for start, end, action in row:
            events.append(
                {
                    "name": str(action),
                    "cat": action.op.value,
                    "ph": "X",
                    "ts": start * 1e6,
                    "dur": (end - start) * 1e6,
                    "pid": rank,
                    "tid": 0,
                    "args": {"stage": action.stage, "microbatch": action.microbatch},
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "title": drawn.title})


def _name(action: Action) -> str:
    words = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient", Op.W: "weight gradient"}
    return f"{words[action.op]} of stage {action.stage}, micro batch {action.microbatch}"
