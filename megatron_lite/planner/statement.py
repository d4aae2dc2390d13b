"""What was planned: devices, model, batch, layout and number formats, as every output says them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import StateFormat, treatment
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.planner.advice import layout_flags
from megatron_lite.planner.forecast import Forecast
from megatron_lite.planner.hardware import Cluster
from megatron_lite.planner.memory import PlanInputs

SCHEMA = 1
"""Of JSON output; a key that goes, or means something else, makes it another."""


def statement_lines(plan: Forecast) -> Iterator[str]:
    """The run of a plan in three lines."""
    blueprint, cluster = plan.blueprint, plan.cluster
    grid, batches, stage = blueprint.grid, blueprint.batch_schedule, plan.asked.parallel.zero_stage
    shared = f", ZeRO stage {stage}" if stage else ""
    yield (
        f"{billions(blueprint.num_parameters)} parameters on {machines(cluster)}: "
        f"tp {grid.tp} x cp {grid.cp} x dp {grid.dp} x pp {grid.pp}, {blueprint.schedule}{shared}"
    )
    yield (
        f"{batches.final_batch_size:,} sequences of {blueprint.model.seq_length:,} per step = "
        f"{blueprint.microbatches():,} micro batches of {batches.micro_batch_size} x dp {grid.dp}"
    )
    yield precision_line(plan.asked, blueprint.optim)


def billions(parameters: int) -> str:
    """How many, short."""
    return f"{parameters / 1e9:,.3f} B" if parameters >= 1e6 else f"{parameters:,}"


def machines(cluster: Cluster) -> str:
    """Devices and nodes."""
    nodes = f"{cluster.num_nodes:,} node{'s' * (cluster.num_nodes > 1)}"
    return f"{cluster.world_size:,} x {cluster.device.name} ({nodes})"


def statement_json(plan: Forecast) -> dict[str, object]:
    """The run of a plan as plain values."""
    blueprint = plan.blueprint
    grid, batches = blueprint.grid, blueprint.batch_schedule
    return {
        "schema": SCHEMA,
        "hardware": hardware_json(plan.cluster),
        "model": model_json(blueprint),
        "precision": precision_json(plan.asked, blueprint.optim),
        "layout": {"tp": grid.tp, "cp": grid.cp, "dp": grid.dp, "pp": grid.pp,
                   "schedule": blueprint.schedule, "zero_stage": plan.asked.parallel.zero_stage,
                   "chunks": len(blueprint.placement) // grid.pp,
                   "micro_batch_size": batches.micro_batch_size,
                   "num_microbatches": blueprint.microbatches(),
                   "global_batch_size": batches.final_batch_size,
                   "flags": layout_flags(plan.asked.parallel, plan.asked.micro_batch_size)},
    }  # fmt: skip


def hardware_json(cluster: Cluster) -> dict[str, object]:
    """A device's numbers, and how many there are of it."""
    return {**dataclasses.asdict(cluster.device), "world_size": cluster.world_size,
            "devices_per_node": cluster.devices_per_node, "num_nodes": cluster.num_nodes}  # fmt: skip


def model_json(blueprint: Blueprint) -> dict[str, object]:
    """A model's settings and sizes."""
    return {**dataclasses.asdict(blueprint.model), "num_parameters": blueprint.num_parameters,
            "padded_vocab_size": blueprint.padded_vocab_size}  # fmt: skip


def precision_line(asked: PlanInputs, optim: OptimConfig) -> str:
    """Which number formats were planned, in words."""
    line, moments = f"precision: {asked.precision.products}", _moments(optim)
    if asked.precision.name == "fp32":
        narrow = "" if moments == "fp32" else f", moments in {moments}"
        return f"{line}{narrow} (--bf16 or --fp16 plans mixed precision)"
    kept = "masters and moments in fp32"
    if moments != "fp32":
        kept = f"masters in fp32, moments in {moments}"
    return f"{line}, gradients accumulated in {_accumulator(asked)}, {kept}"


def _moments(optim: OptimConfig) -> str:
    """The format of all that a matrix has, or of each."""
    return " and ".join(dict.fromkeys(_kept(optim))) or "fp32"


def _kept(optim: OptimConfig) -> list[StateFormat]:
    return [state.storage for state in treatment(optim, Tensor("a", (1024, 1024), "weight")).states]


def _accumulator(asked: PlanInputs) -> str:
    wide = asked.parallel.accumulate_allreduce_grads_in_fp32
    return "fp32" if wide else asked.precision.name


def precision_json(asked: PlanInputs, optim: OptimConfig) -> dict[str, object]:
    """The same as plain values; optimizer: format of the masters."""
    return {
        "parameters": asked.precision.name,
        "tf32": asked.precision.tf32 and asked.precision.name == "fp32",
        "gradient_accumulation": _accumulator(asked),
        "optimizer": "fp32",
        "moments": _kept(optim),
    }
