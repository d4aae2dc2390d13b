"""What a run says of itself before its first step."""

from __future__ import annotations

import math

import torch

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.length import told_of_epochs
from megatron_lite.blueprint.param_groups import group_lines
from megatron_lite.blueprint.turns import BlockDraw
from megatron_lite.config.objectives import has_segments
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.layers.attention import attention_line
from megatron_lite.train.reading import TokenizerFacts
from megatron_lite.train.run import Run


def shard_size(run: Run) -> str:
    """Parameters of this rank's part of the model, in Megatron's words."""
    ctx = run.ctx
    count = sum(local.parameter.numel() for local in run.parameters)
    count += sum(math.prod(one.weight.shape) for one in run.packed)
    return (
        " > number of parameters on (tensor, pipeline) model parallel rank "
        f"({ctx.tp.rank}, {ctx.pp.rank}): {count}"
    )


def tokenizer_lines(tokens: TokenizerFacts) -> list[str]:
    """Which it is, and what ends a document."""
    return [
        f" > tokenizer: {tokens.made_with}",
        f" > end of document: {tokens.end_of_document}",
    ]


def _waits(run: Run) -> list[str]:
    """A line where the host waits for the device in every step though the device could run beside it."""
    if not run.waits_because:
        return []
    why = ", ".join(run.waits_because)
    return [f" > every step waits for the device before its update: {why}"]


def _on_host(share: float, kind: str) -> list[str]:
    """Where masters and state lie, if not on the device, and how many threads update them."""
    if not share:
        return []
    if kind == "cpu":
        return [
            " > --optimizer-cpu-offload: a CPU is its own host: nothing leaves it, and updates are copied"
        ]
    part = "" if share == 1.0 else f"{share:.0%} of "
    return [
        f" > {part}masters and optimizer state lie in host memory, updated there by "
        f"{torch.get_num_threads()} threads"
    ]


def _kernels(run: Run) -> list[str]:
    """Which implementation runs of each op that has a choice, and why, as attention's own line says."""
    chosen = [why for why in run.context.kernels if not why.endswith(": reference")]
    return [f" > kernels: {'; '.join(chosen)}"] if chosen else []


def _compiled(run: Run) -> str:
    """What --torch-compile makes of this run, and why not."""
    compiler = run.context.compiler
    if compiler is None:
        asked = run.context.precision.torch_compile
        return f" > torch.compile: nothing (--torch-compile {asked}, on {run.ctx.device.type})"
    if compiler.failure is not None:
        return f" > torch.compile: nothing ({compiler.failure})"
    return f" > torch.compile: {', '.join(compiler.pieces)}, by {compiler.backend}"


def _adapters(run: Run, lora: LoraConfig) -> list[str]:
    """How much is trained where the model is frozen."""
    if not lora.on:
        return []
    sizes = {spec.name: spec.size for spec in run.blueprint.parameters}
    trained, whole = sum(sizes[name] for name in run.adapters), sum(sizes.values())
    return [
        f" > {lora.lora_variant} adapters of rank {lora.lora_rank} on {' '.join(lora.lora_targets)}, scale "
        f"{lora.scale:g}: {trained:,} of {whole:,} parameters are trained ({trained / whole:.2%})"
        + (", beside matrices of 4 bits (nf4)" if lora.packs else "")
    ]


def _drawn(draw: BlockDraw | None) -> list[str]:
    """What --lisa-layers comes to."""
    if draw is None:
        return []
    first = " ".join(map(str, sorted(draw.at(0))))
    return [
        f" > LISA: {draw.drawn} of {draw.blocks} blocks train at a time, drawn anew every {draw.interval} "
        f"updates (first {first}), beside embedding, final norm and head"
    ]


def description(run: Run, blueprint: Blueprint, config: RunConfig) -> list[str]:
    """The ranks, the length, and what was chosen for this device."""
    grid, ctx = blueprint.grid, run.ctx
    groups = group_lines(config.optim, config.learning_rate, blueprint.parameters)
    segments = has_segments(
        config.train.objective, reset_attention_mask=config.data.reset_attention_mask
    )
    return [
        f"using world size: {grid.world_size}, tensor-parallel {grid.tp} x pipeline-parallel {grid.pp} "
        f"x data-parallel {grid.dp} on {ctx.device.type}, {run.context.precision.name}",
        *told_of_epochs(config.train, blueprint.length),
        f"setting training iterations to {blueprint.train_iters}",
        *_adapters(run, config.lora),
        *_drawn(blueprint.draw),
        *(f" > parameters: {line}" for line in groups),
        attention_line(run.context, config.train.micro_batch_size, segments=segments),
        *_on_host(config.parallel.on_host, ctx.device.type),
        *_waits(run),
        *_kernels(run),
        _compiled(run),
        f" > padded vocab (size: {run.context.vocab_size}) to {run.context.padded_vocab_size}",
    ]
