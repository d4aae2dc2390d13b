"""A decode step whose shapes and addresses never change: what differs from step to step is in tensors.

    inputs   int64 [2, b]    the next token of each row; how many came before it, -1: it brings none
    logits   fp32 [b, v]     a row without a token has some that mean nothing

So its kernels can be recorded once and replayed (replay.py).  It sees the first `slots` of the cache,
those that nothing lies in masked: with as many as are filled it computes what CacheEntry computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.config.sections.model import BY_LENGTH, ModelConfig
from megatron_lite.inference.cache import KeyValueCache, places_kept, seen_slots
from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.layers.outputs import Outputs
from megatron_lite.layers.rotary import TextLength, rotary_tables
from megatron_lite.models.decoder import Decoder


class TurningTables:
    """cos and sin of every position that a cache can have, made once and looked up.

    Where positions are scaled by a text's length each row has its own: follow() rewrites them.
    """

    def __init__(self, model: Decoder, cache: KeyValueCache) -> None:
        self._model, self._cache, self._wholes = model, cache, tuple(cache.wholes)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        channels: int,
        model: ModelConfig,
        index: Tensor,
        length: TextLength,
        factors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """index: int64 [s, b] -> cos and sin, fp32 [s, b, 1, r/2]; the cache knows the length."""
        if channels not in self._made:
            self._made[channels] = self._tables(channels)
        cos, sin = self._made[channels]
        row = 0 if cos.shape[1] == 1 else torch.arange(cos.shape[1], device=index.device)
        return cos[index, row], sin[index, row]

    def follow(self) -> None:
        """The texts in the rows may be others now."""
        if self._wholes == (wholes := tuple(self._cache.wholes)):
            return
        self._wholes = wholes
        if self._model.context.model.rope_scaling_type in BY_LENGTH:
            for channels, tables in self._made.items():
                for table, new in zip(tables, self._tables(channels), strict=True):
                    table.copy_(new)

    def _tables(self, channels: int) -> tuple[Tensor, Tensor]:
        """fp32 [positions, 1 or b, 1, r/2]."""
        model, device = self._model, self._cache.device
        index = torch.arange(self._cache.capacity, device=device)
        at = ForwardContext(samples=index, index=index, length=self._wholes)
        learned = None if model.rotary is None else model.rotary.factors(at)
        return rotary_tables(channels, model.context.model, index, self._wholes, learned)


class FixedEntry:
    """One forward of at most one token of each row, told by tensors alone; see CacheEntry.

    before: int64 [b]; positions: int64 [1, b]; slots: how many of the cache are seen.
    """

    def __init__(
        self, cache: KeyValueCache, before: Tensor, slots: int, turning: TurningTables
    ) -> None:
        self._cache, self._before, self._seen, self._turning = cache, before, slots, turning
        self.unturned = cache.start is not None
        self.positions = before.clamp(0, cache.capacity - 1)[None]
        start = cache.start or 0
        ring = start + (before - start) % (cache.capacity - start)
        slot = torch.where(before < cache.capacity, before, ring)
        # what a row without a token computes lies behind all, as padding does
        self._slots = torch.where(before < 0, cache.capacity, slot)[:, None]

    @property
    def context(self) -> ForwardContext:
        """What the layers are called with."""
        return ForwardContext(
            samples=torch.zeros_like(self._before), index=self.positions, cache=self,
            length=tuple(self._cache.wholes), turning=self._turning,
        )  # fmt: skip

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [b, m, 1, d] of the new tokens -> the slots that are seen, [b, m, slots, d]."""
        self._cache.store(layer, k, v, self._slots)
        return self._cache.held(layer, self._seen)

    def key_positions(self) -> Tensor:
        """int64 [slots, b]: the place of each slot among those kept."""
        slots = torch.arange(self._seen, device=self._before.device)
        if self._cache.start is None:
            return slots[:, None].expand(-1, len(self._before))
        return places_kept(slots, self._before + 1, self._cache)

    def seen(self, window: int | None) -> Tensor:
        """bool [b, 1, 1, slots]: which slots a new token sees."""
        return seen_slots(self.key_positions(), self.positions, window)


class FixedStep:
    """The step of a whole model in one process, over the rows of a cache whose layers have come."""

    def __init__(self, model: Decoder, cache: KeyValueCache) -> None:
        assert model.has_embedding and model.has_head, "a stage of a pipeline is no whole model"
        self._model, self._cache = model, cache
        self._turning = TurningTables(model, cache)
        self._inputs = torch.zeros(2, cache.rows, dtype=torch.int64, device=cache.device)

    def take(self, new: Sequence[Sequence[int]]) -> None:
        """The next token of each row, of some none; nothing waits for the device."""
        self._turning.follow()
        before = zip(new, self._cache.lengths, strict=True)
        numbers = [
            [token for row in new for token in (row or [0])],
            [length if row else -1 for row, length in before],
        ]
        pinned = self._cache.device.type == "cuda"
        self._inputs.copy_(torch.tensor(numbers, pin_memory=pinned), non_blocking=True)

    @torch.no_grad()
    def logits(self, slots: int) -> Tensor:
        """fp32 [b, v] after the tokens taken; a function of tensors alone."""
        entry = FixedEntry(self._cache, self._inputs[1], slots, self._turning)
        found: Tensor = self._model(self._inputs[:1], entry.context, _logits)[0]  # [b, v]
        return found[:, : self._model.context.vocab_size].float()


def _logits(outputs: Outputs) -> Tensor:
    return outputs.logits()
