"""How fast tokens could come at most: a decode step reads every weight and every key once from memory."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.inference.generate import GenerationSpeed
from megatron_lite.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """What the decode steps of a run read on this rank: bytes of weights a step, and of the cache on average.

    rate: tokens per second that were reached; tokens: that a step brings on average.
    """

    weight_bytes: int
    cache_bytes: float
    tokens: float
    rate: float

    def describe(self, bandwidth_gb_s: float | None, device: str) -> str:
        """One line; None: nobody knows the bandwidth of this device."""
        read = (
            f"{_bytes(self.weight_bytes)} of weights and {_bytes(self.cache_bytes)} of cache a step"
        )
        if bandwidth_gb_s is None:
            unknown = f"{device}'s bandwidth is not known: --memory-bandwidth says it"
            return f"memory bound of decode: {read}; {unknown}"
        steps = bandwidth_gb_s * 1e9 / (self.weight_bytes + self.cache_bytes)
        most = steps * self.tokens
        return (
            f"memory bound of decode: {read} at {bandwidth_gb_s:,g} GB/s ({device}) are "
            f"{most:,.1f} tokens/s, of which {self.rate / most:.2f} were reached"
        )


def memory_bound(model: Decoder, speed: GenerationSpeed) -> MemoryBound | None:
    """Of the steps in which tokens only continued; None where there were none, or another rank has layers."""
    context = model.context
    if not speed.new_steps or context.ctx.pp.size > 1:
        return None
    return MemoryBound(
        weight_bytes=_weights(model),
        cache_bytes=_bytes_of_a_token(model) * speed.new_seen / speed.new_steps,
        tokens=speed.new_tokens / speed.new_steps,
        rate=speed.new_tokens / speed.new_seconds,
    )


def _weights(model: Decoder) -> int:
    """Of tables that are only looked up a step reads a row."""
    tables = [model.embedding.positions] if model.tied else [model.embedding]
    looked_up = {p for table in tables if table is not None for p in table.parameters()}
    return sum(p.nbytes for p in model.parameters() if p not in looked_up)


def _bytes_of_a_token(model: Decoder) -> int:
    """Its keys and values in all layers, of the heads that are here."""
    config, context = model.context.model, model.context
    heads = config.num_kv_heads // context.tp.size
    return 2 * config.num_layers * heads * config.head_size * context.dtype.itemsize


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} bytes"
