"""What a pickle becomes besides numbers, texts, lists and dicts: inert records, and tensors not yet read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
_DTYPES = (*_STORAGES.values(), torch.complex64, torch.complex128)
STORAGES_NAMED = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()} | {
    "torch.storage.UntypedStorage": torch.uint8
}
"""Class of a storage -> the format of its numbers."""
DTYPES_NAMED = {str(dtype): dtype for dtype in _DTYPES}


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function that a pickle names: its name, and nothing else of it."""

    name: str


@dataclass(slots=True, eq=False)
class Record:
    """An object of a class that is not known here: what was said of it, and never the object.

    args: what it would be made of; state: what it would be filled with.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: list[Any] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """Its attributes by name, as far as its state is such."""
        found: dict[str, Any] = {}
        for state in self.state:
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    found |= {key: value for key, value in part.items() if isinstance(key, str)}
        return found


@dataclass(frozen=True, slots=True)
class Storage:
    """A stretch of numbers of a file, by its key; dtype: None where the tensors on it say it."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class UnreadTensor:
    """A tensor whose numbers are still in the file; offset and stride count elements of its dtype."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for one that is not inside of its storage."""
        if len(self.shape) != len(self.stride):
            raise ValueError(f"a tensor of {len(self.shape)} dims has {len(self.stride)} strides")
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) + 1
        reach = (self.offset + reach) * self.dtype.itemsize if self.numel else 0
        held = self.storage.bytes
        if reach > held or self.numel * self.dtype.itemsize > held:
            raise ValueError(
                f"a tensor {list(self.shape)} of strides {list(self.stride)} from {self.offset} is not "
                f"inside its storage of {held} bytes"
            )

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)
