"""What a reader of a plan should be told of its number formats and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_lite.blueprint.optimizers import treatment
from megatron_lite.planner.activations import uses_flash
from megatron_lite.planner.awake import has_adapters
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.hardware import GIB
from megatron_lite.planner.memory import RankMemory, memory
from megatron_lite.planner.sharing import shared_by

_WORTH_A_WORD = 1.2
"""Ratio of memory from which a default of another program is told."""


def cautions(plan: Forecast) -> Iterator[str]:
    """Where the run will not be as planned."""
    yield from _formats(plan)
    yield from _owners(plan)


def _owners(plan: Forecast) -> Iterator[str]:
    """Rules that sum over whole matrices, tables too: at stage 3 their owners keep more than a share."""
    blueprint = plan.blueprint
    shared = shared_by(plan.asked.parallel, blueprint.replicas)
    if shared.weights == 1 or has_adapters(blueprint.figure):  # adapters are whole on each
        return
    treated = [treatment(blueprint.optim, spec.tensor) for spec in blueprint.parameters]
    rules = {how.rule for how in treated if how.needs_whole_matrix and how.flops is None}
    for rule in sorted(rules):
        yield (
            f"--zero-stage 3 with {rule}: one rank keeps and updates each matrix and table whole, and "
            "gathers of a layer are as wide as its largest; planned are even shares: rehearsals of 4 "
            "ranks had 1.4 times the memory and 1.7 times the traffic; count yours with --rehearse, "
            "or use --zero-stage 2, of which the plan holds"
        )


def _formats(plan: Forecast) -> Iterator[str]:
    """Formats that the device has no units for: its times are not those of the plan."""
    device, precision = plan.cluster.device, plan.asked.precision
    if device.cpu or device.bf16:
        return
    if precision.bf16:
        yield (
            f"--bf16: {device.name} has no bf16 units and makes such products of slower ones; planned are "
            "the times of --fp16"
        )
    if precision.name == "fp32" and precision.tf32:
        yield f"--tf32: {device.name} has no TF32, its products stay fp32 and slower than planned"


def hints(plan: Forecast) -> Iterator[str]:
    """What would be faster at no cost that a plan knows."""
    device, precision = plan.cluster.device, plan.asked.precision
    if device.cpu or precision.name != "fp32" or plan.costs.given is not None:
        return
    name = "bf16" if device.bf16 else "fp16"
    narrow = replace(precision, bf16=device.bf16, fp16=not device.bf16)
    asked = replace(plan.asked, precision=narrow)
    then = forecast(plan.blueprint, asked, plan.cluster)
    faster = sum(plan.seconds.values()) / sum(then.seconds.values())
    if faster > 1.0:
        yield (
            f"add --{name}: {faster:.1f} times as fast by this plan, {then.worst.total / GIB:,.1f} GiB "
            f"instead of {plan.worst.total / GIB:,.1f}"
        )


def kernel_notes(plan: Forecast) -> Iterator[str]:
    """What other programs' defaults would keep less of."""
    model, asked = plan.blueprint.model, plan.asked
    low = asked.precision.name != "fp32"
    if not low or not model.attention_softmax_in_fp32:
        return
    if uses_flash(model, asked.precision, on_gpu=asked.on_gpu):
        return
    narrow = replace(plan.blueprint, model=replace(model, attention_softmax_in_fp32=False))
    rank = plan.worst.pp_rank
    (then,) = memory(narrow, asked, pp_ranks=[rank])
    now, before = _while_computing(plan.worst), _while_computing(then)
    if now >= _WORTH_A_WORD * before:
        yield (
            f"attention is not fused and its softmax is in fp32: pp {rank} keeps {now / GIB:,.2f} GiB of micro "
            f"batches; as Megatron-LM's default has it (--no-attention-softmax-in-fp32) {before / GIB:,.2f}"
        )


def _while_computing(rank: RankMemory) -> float:
    return sum(rank.computing.values())
