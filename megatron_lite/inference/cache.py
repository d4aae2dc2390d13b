"""KV cache: the keys and values of every layer, stored after rotation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class KeyValueCache:
    """Grows by what each forward adds, up to `capacity` tokens; preallocated on first use."""

    capacity: int
    length: int = 0
    _keys: dict[int, Tensor] = field(default_factory=dict)
    _values: dict[int, Tensor] = field(default_factory=dict)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [b, m, new, d] -> everything so far with the new part, [b, m, length + new, d]."""
        new = k.shape[2]
        if layer not in self._keys:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self._keys[layer], self._values[layer] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + new
        self._keys[layer][:, :, self.length : end] = k
        self._values[layer][:, :, self.length : end] = v
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, new: int) -> None:
        """All layers have added `new` tokens."""
        self.length += new

    def positions(self, new: int, device: torch.device) -> Tensor:
        """int64 [new]: where the next tokens stand."""
        return torch.arange(self.length, self.length + new, device=device)
