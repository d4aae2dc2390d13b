"""A search as a ranked table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.planner import statement
from megatron_lite.planner.advice import layout_flags
from megatron_lite.planner.columns import aligned
from megatron_lite.planner.forecast import Forecast
from megatron_lite.planner.hardware import GIB, Cluster
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.planner.remarks import cautions
from megatron_lite.planner.search import SearchResult
from megatron_lite.planner.trust import range_json, trusted


class Ranking:
    """What was found, beside what was asked.

    fixed: fields that were not searched, and their flags; notes: on the run and the first of the layouts.
    """

    def __init__(
        self, found: SearchResult, asked: PlanInputs, optim: OptimConfig, cluster: Cluster,
        notes: Sequence[str], *, fixed: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.found, self.asked, self.optim, self.cluster = found, asked, optim, cluster
        self.notes, self.fixed = list(notes), fixed

    @property
    def _any(self) -> Blueprint | None:
        """One of the layouts: their model and global batch are the same."""
        one = next(iter(self.found.ranked), self.found.closest)
        return None if one is None else one.blueprint

    @property
    def _warnings(self) -> list[str]:
        return [line for plan in self.found.ranked[:1] for line in cautions(plan)]

    def _kept(self) -> Iterator[str]:
        """What was not searched, as the line says it."""
        for field, flag in self.fixed.items():
            value = getattr(self.asked.parallel, field, self.asked.micro_batch_size)
            shown = " ".join(value) if isinstance(value, list) else str(value)
            yield flag if value is True else f"{flag} {shown}"

    def text(self) -> str:
        """A line for each layout, the fastest first."""
        found = self.found
        counted = (
            f"the {len(found.ranked)} fastest layouts that fit" if found.ranked else "nothing fits"
        )
        lines = [
            *self._head(),
            f"{counted}; {found.num_too_large:,} are too large, {found.num_forbidden:,} break a rule, "
            f"{found.num_slower:,} are slower",
        ]
        if found.ranked:
            rows = [["", "s/step", "TGS", "MFU", "GiB", "bubble", "schedule"]]
            rows += [_row(n, plan) for n, plan in enumerate(found.ranked, start=1)]
            lines += aligned(rows, least=3)
        lines += self._closest()
        range_ = trusted(found.ranked[0]) if found.ranked else None
        if range_ is not None:
            between = f"{range_.low:.3f} to {range_.high:.3f}"
            lines.append(f"the first takes {between} s, others in proportion")
            lines += [f"a range, not a number: {doubt}" for doubt in range_.why]
        lines += [f"warning: {warning}" for warning in self._warnings]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _head(self) -> Iterator[str]:
        blueprint, where = self._any, statement.machines(self.cluster)
        if blueprint is None:
            yield f"on {where}"
        else:
            batch, length = blueprint.batch_schedule.final_batch_size, blueprint.model.seq_length
            yield f"{statement.billions(blueprint.num_parameters)} parameters on {where}"
            yield f"{batch:,} sequences of {length:,} per step"
        yield statement.precision_line(self.asked, self.optim)
        if self.fixed:
            yield f"not searched: {' '.join(self._kept())}"

    def _closest(self) -> Iterator[str]:
        closest = self.found.closest
        if closest is not None:
            flags = layout_flags(closest.asked.parallel, closest.asked.micro_batch_size)
            yield f"the closest needs {closest.worst.total / GIB:,.1f} GiB: {flags}"

    def json(self) -> dict[str, object]:
        """Plain values, best first."""
        found, blueprint = self.found, self._any
        return {
            "schema": statement.SCHEMA,
            "hardware": statement.hardware_json(self.cluster),
            "model": None if blueprint is None else statement.model_json(blueprint),
            "global_batch_size": None
            if blueprint is None
            else blueprint.batch_schedule.final_batch_size,
            "precision": statement.precision_json(self.asked, self.optim),
            "fixed": list(self._kept()),
            "num_too_large": found.num_too_large,
            "num_forbidden": found.num_forbidden,
            "num_slower": found.num_slower,
            "layouts": [_layout(plan) for plan in found.ranked],
            "closest": None if found.closest is None else _layout(found.closest),
            "warnings": self._warnings,
            "notes": self.notes,
        }


def _row(number: int, plan: Forecast) -> list[str]:
    seconds = plan.rates.step_seconds
    return [
        f"{number}", f"{seconds:,.{3 if seconds >= 1 else 4}f}", f"{plan.rates.tgs:,.1f}",
        f"{plan.rates.mfu:.1%}", f"{plan.worst.total / GIB:,.1f}", f"{plan.bubble:.1%}",
        plan.blueprint.schedule, layout_flags(plan.asked.parallel, plan.asked.micro_batch_size),
    ]  # fmt: skip


def _layout(plan: Forecast) -> dict[str, object]:
    grid = plan.blueprint.grid
    return {
        "flags": layout_flags(plan.asked.parallel, plan.asked.micro_batch_size),
        "tp": grid.tp, "pp": grid.pp, "dp": grid.dp, "cp": grid.cp,
        "schedule": plan.blueprint.schedule,
        "chunks": len(plan.blueprint.placement) // grid.pp,
        "micro_batch_size": plan.asked.micro_batch_size,
        "num_microbatches": plan.blueprint.microbatches(),
        "zero_stage": plan.asked.parallel.zero_stage,
        "recompute_granularity": plan.asked.parallel.recompute_granularity,
        "step_seconds": plan.rates.step_seconds,
        "tgs": plan.rates.tgs,
        "mfu": plan.rates.mfu,
        "total_bytes": plan.worst.total,
        "bubble": plan.bubble,
        **range_json(plan),
    }  # fmt: skip
