"""What a rehearsal measured beside what the plan says, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.planner.hardware import GIB
from megatron_lite.planner.memory import PlanInputs, RankMemory, memory
from megatron_lite.planner.traffic import sent_bytes

MEMORY_KINDS = ("weights", "gradients", "masters", "moments", "activations", "work")
TRAFFIC_AXES = ("tp", "pp", "dp", "tied")

_PLANNED_AS = {
    "activations": ("activations", "logits", "communication"),
    "work": ("recomputed", "workspace", "whole", "staging"),
}


@dataclass(frozen=True, slots=True)
class RehearsedRank:
    """One rank's bytes at its worst moment by kind (see KINDS), and bytes sent by axis."""

    rank: int
    memory: Mapping[str, float]
    sent: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """A rank's numbers, and the plan's for it."""

    rank: int
    pp_rank: int
    memory: Mapping[str, float]
    planned_memory: Mapping[str, float]
    sent: Mapping[str, float]
    planned_sent: Mapping[str, float]

    @property
    def memory_ratio(self) -> float:
        """Measured peak over planned."""
        return sum(self.memory.values()) / sum(self.planned_memory.values())

    @property
    def sent_ratios(self) -> dict[str, float]:
        """Measured over planned of each axis that carries more than the numbers all ranks sum."""
        return {
            axis: self.sent.get(axis, 0.0) / planned
            for axis, planned in self.planned_sent.items()
            if planned
        }


def beside_plan(
    measured: Sequence[RehearsedRank],
    blueprint: Blueprint,
    asked: PlanInputs,
    *,
    num_microbatches: int,
) -> list[Row]:
    """Each rank's measured numbers with the plan's for a step of so many micro batches."""
    planned = memory(blueprint, asked, num_microbatches=num_microbatches)
    rows = []
    for one in measured:
        pp_rank = blueprint.grid.coords(one.rank).pp
        rows.append(
            Row(
                rank=one.rank,
                pp_rank=pp_rank,
                memory=one.memory,
                planned_memory=_kinds(planned[pp_rank]),
                sent=one.sent,
                planned_sent=sent_bytes(
                    blueprint, asked, one.rank, num_microbatches=num_microbatches
                ),
            )
        )
    return rows


def _kinds(planned: RankMemory) -> dict[str, float]:
    return {
        kind: sum(planned.kinds.get(part, 0.0) for part in _PLANNED_AS.get(kind, (kind,)))
        for kind in MEMORY_KINDS
    }


def rehearsal_tables(rows: Sequence[Row]) -> str:
    """Both tables: GiB at the worst moment by kind, GiB sent by axis; ranks of equal numbers together."""
    groups = _equal_rows(rows)
    return "\n".join((*_memory_table(groups), "", *_sent_table(groups)))


_Groups = Sequence[tuple[str, Row]]


def _equal_rows(rows: Sequence[Row]) -> _Groups:
    """(names of the ranks, their row) for all rows that differ."""
    equal: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.pp_rank, *row.memory.values(), *sorted(row.sent.items()))
        equal.setdefault(key, []).append(row)
    return [(_names(same), same[0]) for same in equal.values()]


def _names(rows: Sequence[Row]) -> str:
    ranks = [row.rank for row in rows]
    many = len(ranks) > 1
    shown = ", ".join(map(str, ranks[:3])) + (f" ... {ranks[-1]}" if len(ranks) > 3 else "")
    return f"pp {rows[0].pp_rank}: rank{'s' if many else ''} {shown}"


_NAME = 28


def _unit(largest: float) -> tuple[str, float]:
    return ("GiB", GIB) if largest >= GIB else ("MiB", 2.0**20)


def _memory_table(groups: _Groups) -> Iterator[str]:
    head = "".join(f"{kind:>12}" for kind in MEMORY_KINDS)
    unit, size = _unit(max(sum(row.memory.values()) for _, row in groups))
    yield f"{unit + ' at the worst moment':<{_NAME + 9}}{head}{'peak':>10}{'ratio':>8}"
    for name, row in groups:
        for label, numbers in (("rehearsed", row.memory), ("planned", row.planned_memory)):
            first = label == "rehearsed"
            cells = "".join(f"{numbers[kind] / size:>12.3f}" for kind in MEMORY_KINDS)
            ratio = f"{row.memory_ratio:>8.3f}" if first else ""
            total = sum(numbers.values()) / size
            yield f"{name if first else '':<{_NAME}}{label:<9}{cells}{total:>10.3f}{ratio}"


def _sent_table(groups: _Groups) -> Iterator[str]:
    axes = [axis for axis in TRAFFIC_AXES if any(row.planned_sent.get(axis) for _, row in groups)]
    if not axes:
        yield "one rank alone sends nothing"
        return
    head = "".join(f"{axis:>11}{'planned':>11}{'ratio':>8}" for axis in axes)
    unit, size = _unit(max(max(row.planned_sent.values()) for _, row in groups))
    yield f"{unit + ' sent in the step':<{_NAME}}{head}"
    for name, row in groups:
        cells = "".join(
            f"{row.sent.get(axis, 0.0) / size:>11.3f}{row.planned_sent[axis] / size:>11.3f}"
            + (f"{row.sent_ratios[axis]:>8.3f}" if axis in row.sent_ratios else f"{'-':>8}")
            for axis in axes
        )
        yield f"{name:<{_NAME}}{cells}"
