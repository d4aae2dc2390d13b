"""What an attention kernel is asked for besides q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.kernels.segments import Segments


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One causal attention: scale, dropout and what may be seen.

    keep: makes the dropout mask [b, n, s, t] (bool) from global coordinates; the reference kernel uses it.
    seed: one generator state for the kernels that draw their own mask.
    segments: tokens of one segment alone see one another, on top of the causal mask; s = t then.
    window: tokens that one sees, itself included, on top of the causal mask; None for all before it.
    seen: bool [b, 1, s, t] in place of all these: rows of a cache that stand at unequal lengths.
    layer_scale: query-key layer scaling: scores are divided by it before and multiplied after.
    """

    dropout: float = 0.0
    keep: Callable[[], Tensor] | None = None
    seed: int = 0
    scale: float | None = None
    layer_scale: float = 1.0
    softmax_in_fp32: bool = True
    segments: Segments | None = None
    window: int | None = None
    seen: Tensor | None = None

    def allowed(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """bool [.., s, t]: where a query may see a key; the last query is the last key."""
        if self.seen is not None:
            return self.seen
        if self.segments is not None:
            return self._near(self.segments.allowed)
        whole = torch.ones(queries, keys, dtype=torch.bool, device=device)
        return self._near(whole.tril_(keys - queries))

    def _near(self, mask: Tensor) -> Tensor:
        """The mask without what lies before the window."""
        queries, keys = mask.shape[-2:]
        return mask if self.window is None else mask.triu(keys - queries - self.window + 1)
