"""A Forecast as a readable table and as JSON; every number of the one is in the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lite.blueprint.schedules.actions import Op
from megatron_lite.planner import statement
from megatron_lite.planner.activations import VARIANTS, korthikanti
from megatron_lite.planner.advice import Change, warnings
from megatron_lite.planner.columns import aligned
from megatron_lite.planner.corpus import Reading
from megatron_lite.planner.curve import Point
from megatron_lite.planner.forecast import (
    DAY,
    Forecast,
    hardware_flops_per_token,
)
from megatron_lite.planner.hardware import GIB
from megatron_lite.planner.memory import RankMemory, layer_items
from megatron_lite.planner.remarks import cautions, hints, kernel_notes
from megatron_lite.planner.trust import range_json, trusted

_ALWAYS = ("activations", "logits")
"""Kinds with a column even where all are 0."""
_SHORT = {"communication": "comm", "fragmentation": "reserve", "activations": "activ."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """What a report says beside the forecast.  begins: whether the run learns from nothing."""

    notes: tuple[str, ...] = ()
    tokens: float | None = None
    begins: bool = True
    curve: tuple[Point, ...] = ()
    epochs: tuple[Reading, ...] = ()
    changes: tuple[Change, ...] = ()
    price_per_hour: float | None = None


def plan_json(plan: Forecast, extra: Extra) -> dict[str, object]:
    """All of it as plain values: bytes, seconds, shares of one, tokens per second."""
    blueprint, rates = plan.blueprint, plan.rates
    batches, model = blueprint.batch_schedule, blueprint.model
    per_step = batches.final_batch_size * model.seq_length
    return {
        **statement.statement_json(plan),
        "fits": plan.fits,
        "stages": [
            {"pp_rank": rank.pp_rank, "layers": list(rank.layers), "parameters": rank.parameters,
             "memory_bytes": dict(rank.kinds), "allocated_bytes": rank.allocated,
             "total_bytes": rank.total, "host_bytes": rank.host, "worst_moment": rank.worst_moment,
             "computing_bytes": dict(rank.computing),
             "fits": rank.total <= plan.cluster.device.memory_bytes,
             "live_microbatches": {str(stage): count for stage, count in rank.live.items()}}
            for rank in plan.memory
        ],
        "activation_bytes_per_layer": _per_layer(plan),
        "flops": {"per_token": blueprint.flops_per_token_full,
                  "per_token_causal": blueprint.flops_per_token_causal,
                  "per_token_hardware": _hardware_flops(plan),
                  "per_step": blueprint.flops_per_token_full * per_step,
                  "per_step_causal": blueprint.flops_per_token_causal * per_step,
                  "per_step_hardware": _hardware_flops(plan) * per_step},
        "time": {"step_seconds": rates.step_seconds,
                 "predicted_step_seconds": sum(plan.seconds.values()),
                 "seconds": dict(plan.seconds), "hidden_seconds": dict(plan.hidden_seconds),
                 "bubble": plan.bubble, **range_json(plan)},
        "pipeline": _pipeline(plan),
        "rates": {"tokens_per_second_per_gpu": rates.tgs, "tgs": rates.tgs,
                  "tflops_per_gpu": rates.tflops, "tflops_per_gpu_causal": rates.tflops_causal,
                  "tflops_per_gpu_hardware": rates.tflops_hardware,
                  "mfu": rates.mfu, "mfu_causal": rates.mfu_causal, "hfu": rates.hfu,
                  "hfu_published_formula": rates.hfu_published},
        "run": _run(plan, extra),
        "curve": [dataclasses.asdict(point) for point in extra.curve],
        "epochs": [reading._asdict() for reading in extra.epochs],
        "cheapest_change": next(map(_changed, extra.changes), None),
        "changes": [_changed(change) for change in extra.changes],
        "warnings": list(_warnings(plan, extra)),
        "hints": list(hints(plan)),
        "notes": list(_notes(plan, extra)),
    }  # fmt: skip


def to_text(plan: Forecast, extra: Extra, *, width: int | None = None) -> str:
    """The same as a table of kinds per pipeline rank, then time, rates, cost and curve.

    width: of the terminal; a table that is wider comes in parts.
    """
    sections = (
        statement.statement_lines(plan), _memory(plan, width), _verdict(plan, extra), _time(plan), _rates(plan),
        _cost(plan, extra), _curve(extra), _epochs(extra),
        (f"warning: {warning}" for warning in _warnings(plan, extra)),
        (f"hint: {hint}" for hint in hints(plan)),
        (f"note: {note}" for note in _notes(plan, extra)),
    )  # fmt: skip
    return "\n".join(line for section in sections for line in section)


def _warnings(plan: Forecast, extra: Extra) -> Iterator[str]:
    yield from cautions(plan)
    yield from warnings(plan, extra.tokens, begins=extra.begins)


def _notes(plan: Forecast, extra: Extra) -> Iterator[str]:
    yield from plan.blueprint.notes
    yield from kernel_notes(plan)
    yield from extra.notes


def _memory(plan: Forecast, width: int | None) -> Iterator[str]:
    yield ""
    capacity = plan.cluster.device.memory_bytes
    kinds = [
        kind
        for kind in plan.memory[0].kinds
        if kind in _ALWAYS or any(rank.kinds[kind] for rank in plan.memory)
    ]
    rows = [
        ["GiB per rank", "layers", "params", *(_SHORT.get(kind, kind) for kind in kinds), "total"]
    ]
    for rank in plan.memory:
        verdict = "fits" if rank.total <= capacity else "DOES NOT FIT"
        rows.append([
            f"pp {rank.pp_rank}", f"{len(rank.layers)}", f"{rank.parameters / 1e9:,.3f}B",
            *(_gib(rank, kind) for kind in kinds), f"{rank.total / GIB:,.2f}", verdict,
        ])  # fmt: skip
    yield from aligned(rows, left=1, width=width)
    yield from _later(plan)
    yield f"a device has {capacity / GIB:,.1f} GiB ({capacity / 1e9:,g} GB); {_layer_line(plan)}"
    if plan.host_bytes:
        room = plan.cluster.device.host_memory_gb * 1e9 / GIB
        has = f"it has {room:,.0f}" if room else "what it has is not known"
        yield (
            f"host memory: {max(rank.host for rank in plan.memory) / GIB:,.1f} GiB per rank, "
            f"{plan.host_bytes / GIB:,.1f} GiB of a node; {has}"
        )


def _gib(rank: RankMemory, kind: str) -> str:
    """In brackets what micro batches took before the worst moment, when nothing of it is left."""
    before = 0.0 if rank.worst_moment == "computing" else rank.computing.get(kind, 0.0)
    return f"({before / GIB:,.2f})" if before else f"{rank.kinds[kind] / GIB:,.2f}"


_LATER = {
    "reducing": "when gradients are reduced",
    "updating": "when matrices are updated whole",
    "gathering": "when weights are gathered",
}


def _later(plan: Forecast) -> Iterator[str]:
    """Why there are brackets."""
    found: dict[str, list[str]] = {}
    for rank in plan.memory:
        found.setdefault(rank.worst_moment, []).append(str(rank.pp_rank))
    for moment in found.keys() - {"computing"}:
        yield (
            f"pp {', '.join(found[moment])}: most is needed {_LATER[moment]}, in buffers under comm; what "
            "is in brackets was there before and is no part of the total"
        )


def _layer_line(plan: Forecast) -> str:
    per_layer = _per_layer(plan)
    ours = per_layer["kept"]
    assert isinstance(ours, float)
    return f"a layer keeps {ours / 2**20:,.0f} MiB per micro batch where nothing is recomputed"


def _verdict(plan: Forecast, extra: Extra) -> Iterator[str]:
    if plan.fits:
        return
    over = (plan.worst.total - plan.cluster.device.memory_bytes) / GIB
    if over > 0:
        yield f"DOES NOT FIT: pp {plan.worst.pp_rank} needs {over:.1f} GiB more than there is"
    if plan.lacks_on_host:
        lacks = plan.lacks_on_host / GIB
        yield f"DOES NOT FIT: a node needs {lacks:,.1f} GiB of host memory more than it has"
    if not extra.changes:
        yield "no layout near this one fits on these devices: --search looks at all, or use more nodes"
    for change in extra.changes:
        then, cheapest = change.forecast, change is extra.changes[0]
        left_out = f" without {change.without}" if change.without else ""
        yield (
            f"{'cheapest' if cheapest else 'another'} change: {change.flags}{left_out} -> "
            f"{then.worst.total / GIB:.1f} GiB, {then.rates.step_seconds:.3f} s per step, "
            f"{then.rates.tgs:,.0f} TGS"
        )


def _changed(change: Change) -> dict[str, object]:
    return {"flags": change.flags, "without": change.without,
            "step_seconds": change.forecast.rates.step_seconds,
            "total_bytes": change.forecast.worst.total}  # fmt: skip


def _time(plan: Forecast) -> Iterator[str]:
    yield ""
    predicted = sum(plan.seconds.values())
    range_ = trusted(plan)
    if range_ is None:
        yield f"seconds per step{predicted:>26.3f}"
    else:
        both = f"{range_.low:.3f} to {range_.high:.3f}"
        yield f"seconds per step{both:>26}; by this sum {predicted:.3f}"
    for kind, seconds in plan.seconds.items():
        hidden = plan.hidden_seconds.get(kind, 0.0)
        besides = f"   and {hidden:.3f} hidden under computation" if hidden else ""
        yield f"  {kind:<24}{seconds:>16.3f}{seconds / predicted:>8.1%}{besides}"
    for kind, seconds in plan.hidden_seconds.items():
        if kind not in plan.seconds and seconds:
            yield f"  {kind:<24}{'hidden':>16}   {seconds:.3f}"
    yield from _doubts(plan)


def _slowest_fastest(plan: Forecast) -> tuple[float, float]:
    """Multiples of the predicted rates between which they may be; 1 where their number stands."""
    range_, step = trusted(plan), plan.rates.step_seconds
    if range_ is None or step != sum(plan.seconds.values()):
        return 1.0, 1.0
    return step / range_.high, step / range_.low


def _between(rate: float, least: float, most: float) -> str:
    return f"{rate:,.1f}" + (f" ({rate * least:,.0f} to {rate * most:,.0f})" * (least != most))


def _doubts(plan: Forecast) -> Iterator[str]:
    range_ = trusted(plan)
    for doubt in range_.why if range_ else ():
        yield f"a range, not a number: {doubt}"


def _rates(plan: Forecast) -> Iterator[str]:
    r = plan.rates
    yield ""
    if r.step_seconds != sum(plan.seconds.values()):
        yield f"measured: {r.step_seconds:.3f} s per step, from which all below follows"
    world, peak = plan.blueprint.grid.world_size, plan.cluster.device.peak_tflops
    least, most = _slowest_fastest(plan)
    share = f" ({r.mfu * least:.1%} to {r.mfu * most:.1%})" * (least != most)
    samples = r.tgs * world / plan.blueprint.model.seq_length
    yield (
        f"TGS {_between(r.tgs, least, most)} tokens per second and GPU; all together "
        f"{r.tgs * world:,.0f} tokens, {samples:,.4g} sequences per second"
    )
    yield (
        f"MFU {r.mfu:.1%}{share} = {_tflops(r.tflops)} TFLOP/s per GPU of {peak:,g} (dense 16-bit peak); FLOPs "
        "of the model, attention as a full square (SC21)"
    )
    yield (
        f"  causal {r.mfu_causal:.1%} = {_tflops(r.tflops_causal)}, of attention the half that is seen "
        "(Megatron-LM since 2025)"
    )
    published = (
        f" ({r.hfu_published:.1%} by the formula of arXiv:2205.05198)"
        if abs(r.hfu_published - r.hfu) > 1e-9
        else ""
    )
    yield (
        f"HFU {r.hfu:.1%} = {_tflops(r.tflops_hardware)} TFLOP/s per GPU, with what is recomputed{published}"
    )
    full, causal = plan.blueprint.flops_per_token_full, plan.blueprint.flops_per_token_causal
    yield f"FLOPs per token {full:.4e}, causal {causal:.4e}, hardware {_hardware_flops(plan):.4e}"


def _tflops(number: float) -> str:
    """Of a CPU's core, too, whose whole peak is a tenth."""
    return f"{number:,.1f}" if number >= 10 else f"{number:.3g}"


def _cost(plan: Forecast, extra: Extra) -> Iterator[str]:
    run = _run(plan, extra)
    days, hours = run.get("days"), run.get("gpu_hours")
    if isinstance(days, float) and isinstance(hours, float):
        price = run.get("price")
        least, most = _slowest_fastest(plan)
        each = f" at {extra.price_per_hour:,g} each" if extra.price_per_hour else ""
        money = f", {_few(price)}{each}" if isinstance(price, float) else ""
        doubted = ""
        if least != most:
            cost = (
                f", {_few(price / most)} to {_few(price / least)}"
                if isinstance(price, float)
                else ""
            )
            doubted = f" ({_duration(days / most)} to {_duration(days / least)}{cost})"
        yield (
            f"{extra.tokens:,.0f} tokens: {_duration(days)} without a stop, {_few(hours)} GPU-hours{money}"
            f"{doubted}; {run['tokens_per_parameter']:.1f} tokens per parameter"
        )


def _duration(days: float) -> str:
    for unit, hours in (("days", 24.0), ("hours", 1.0)):
        if days * 24 >= 2 * hours:
            return f"{days * 24 / hours:,.1f} {unit}"
    return f"{days * 1440:,.1f} minutes"


def _few(number: float) -> str:
    """Whole where it is large, three digits where it is small."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _curve(extra: Extra) -> Iterator[str]:
    if len(extra.curve) < 2:
        return
    yield ""
    rows = [["iteration", "tokens", "batch", "learning rate"]]
    rows += [
        [f"{p.iteration:,}", f"{p.tokens:,}", f"{p.global_batch_size:,}", f"{p.lr:.4e}"]
        for p in extra.curve
    ]
    yield from aligned(rows, least=12)


def _epochs(extra: Extra) -> Iterator[str]:
    for reading in extra.epochs:
        yield f"{reading.prefix}: {reading.tokens:,} tokens, read {reading.epochs:.2f} times"


def _run(plan: Forecast, extra: Extra) -> dict[str, object]:
    if not extra.tokens:
        return {"tokens": None, "days": None, "gpu_hours": None}
    world = plan.blueprint.grid.world_size
    seconds = plan.rates.seconds_for(extra.tokens, world)
    hours = seconds / 3600 * world
    return {
        "tokens": extra.tokens,
        "days": seconds / DAY,
        "gpu_hours": hours,
        "price": hours * extra.price_per_hour if extra.price_per_hour else None,
        "tokens_per_parameter": extra.tokens / plan.blueprint.num_parameters,
    }


def _per_layer(plan: Forecast) -> dict[str, object]:
    blueprint, asked = plan.blueprint, plan.asked
    items = layer_items(blueprint, asked)[0]
    return {
        "kept": items.total,
        "items": dataclasses.asdict(items),
        "korthikanti": {
            variant: korthikanti(
                blueprint.model, micro_batch_size=asked.micro_batch_size,
                tp=blueprint.grid.tp, variant=variant,
            )
            for variant in VARIANTS
        },
    }  # fmt: skip


def _pipeline(plan: Forecast) -> dict[str, object]:
    """What the schedule costs; bubble_rate is (span - work) / span, as in arXiv:2401.10241."""
    blueprint, costs = plan.blueprint, plan.costs
    return {
        "schedule": blueprint.schedule,
        "num_microbatches": blueprint.microbatches(),
        "bubble_rate": plan.bubble,
        "span_seconds": plan.span_seconds,
        "message_seconds": costs.message_seconds(),
        "peak_live_microbatches": [sum(rank.live.values()) for rank in plan.memory],
        "stages": [
            {"stage": stage.index, "pp_rank": blueprint.placement[stage.index],
             "forward_seconds": costs.work(Op.F, stage).seconds,
             "input_gradient_seconds": costs.work(Op.I, stage).seconds,
             "weight_gradient_seconds": costs.work(Op.W, stage).seconds}
            for stage in blueprint.stages
        ],
    }  # fmt: skip


def _hardware_flops(plan: Forecast) -> int:
    return hardware_flops_per_token(plan.blueprint, plan.asked.parallel)
