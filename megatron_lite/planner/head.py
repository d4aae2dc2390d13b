"""Bytes of the final norm, the head and the loss of a micro batch on one rank, whole or in chunks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.logits import LogitsBudget
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.planner.activations import element_bytes

WIDENED_BYTES = 64 * 2**20
"""What of the logits is fp32 at a time; kernels/cross_entropy.py has the same number."""


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """What the end of a model holds.

    norm: kept by the final norm from forward to backward; kept: by head and loss, which is part of
    what they hold at the worst moments of forward and backward.
    waiting: from I to W, where the weight gradient is deferred.
    """

    norm: float
    kept: float
    forward: float
    backward: float
    waiting: float


def logits_chunks(blueprint: Blueprint, parallel: ParallelConfig, position: float) -> int:
    """Chunks of a micro batch; position: bytes of the logits of one place in its sequences."""
    if not blueprint.figure.output.vocabulary:
        return 1
    budget = LogitsBudget.from_config(parallel, blueprint.schedule)
    return budget.chunks(blueprint.model.seq_length // parallel.cp, position)


def head_bytes(
    blueprint: Blueprint,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    micro_batch_size: int,
    on_gpu: bool,
    passing: float,
) -> HeadBytes:
    """Whole, the loss keeps the logits and writes their gradient over them in backward.

    In chunks it keeps what its forward made, the gradients of its input and, in fp32, of the weight.
    passing: bytes per weight of a product on its way into the accumulator.
    """
    low, hidden = element_bytes(precision), blueprint.model.hidden_size
    columns = blueprint.figure.output.local_rows(blueprint.grid.tp)
    tokens = blueprint.model.seq_length * micro_batch_size / parallel.cp
    whole = tokens * hidden * low
    stream = whole / (parallel.tp if parallel.splits_sequence else 1)
    inner = 8 * stream / low if blueprint.figure.final_norm.function == "RMSNorm" else stream
    number = logits_chunks(blueprint, parallel, micro_batch_size * columns * low)
    logits = tokens * columns * low / number
    block = min(4 * logits / low, WIDENED_BYTES)
    # a CPU widens 16-bit logits before their softmax
    scored = block * (2 if low == 2 and not on_gpu else 1)
    if number == 1:
        adding = columns * hidden * passing + 2 * stream
        backward = logits + max(block * (low == 2), adding)
        return HeadBytes(inner + stream, logits, logits + scored, backward, logits + stream)
    weight = 4.0 * columns * hidden
    gathered = whole * parallel.splits_sequence
    # dx as chunks, then in one piece beside them
    forward = stream + gathered + weight + whole + logits + max(whole, scored)
    return HeadBytes(inner, stream + weight, forward, stream + weight, 0.0)
