"""Writes the safetensors format through a Disk, hashing on the way; reading uses the library.

Layout (huggingface/safetensors, format description): u64 header length, JSON header
{name: {dtype, shape, data_offsets}}, then the tensors' bytes, little-endian, without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.checkpoint.hashing import BLOCKS, HASH_KINDS, Hasher
from megatron_lite.checkpoint.schema import checked_int, mapping, word
from megatron_lite.config.errors import NumericsError
from megatron_lite.storage.disk import Disk

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}

_LONG_BYTES = 4 << 20
_WRITE_BYTES = 16 << 20  # per write: bounds the host copy of a device tensor that is not contiguous


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: its size, and its content hash of one of hashing's KINDS."""

    bytes: int
    hash: str
    kind: str = BLOCKS

    def to_json(self) -> dict[str, int | str]:
        """As a manifest holds it: the kind is the hash's key."""
        return {"bytes": self.bytes, self.kind: self.hash}

    @classmethod
    def from_json(cls, stored: object) -> Written:
        """What to_json gave; raises KeyError where there is no hash of a known kind, or ValueError."""
        values = mapping(stored, "a file's entry")
        kind = next((kind for kind in HASH_KINDS if kind in values), BLOCKS)
        return cls(checked_int(values["bytes"], "a file's bytes"), word(values[kind], kind), kind)


def file_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that write_tensors will write, to within the length of the names."""
    return sum(t.numel() * t.element_size() + 160 for t in tensors)


class TensorForm(NamedTuple):
    """Number format and shape of a tensor that is still to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, tensors: dict[str, Tensor], disk: Disk, *, not_finite: list[str] | None = None
) -> Written:
    """Write and fsync a new safetensors file of named tensors of any shapes; its size and hash.

    not_finite: gets the names of those with a value that is not finite; NumericsError without it.
    Raises StorageError where the file exists, or cannot be written whole.
    """
    forms = {name: TensorForm(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return write_stream(path, forms, tensors.values(), disk, not_finite=not_finite)


def write_stream(
    path: Path,
    forms: Mapping[str, TensorForm],
    tensors: Iterable[Tensor],
    disk: Disk,
    *,
    metadata: Mapping[str, str] | None = None,
    not_finite: list[str] | None = None,
) -> Written:
    """The same for tensors that come one by one, in the order of their forms, and are not kept."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, form in forms.items():
        stop = start + form.bytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin 8-byte aligned
    looks: list[tuple[str, Future[bool]]] = []
    with disk.create(path) as file, Hasher() as hashed:
        for data in (len(text).to_bytes(8, "little"), text):
            hashed.update(data)
            file.write(data)
        for (name, form), tensor in zip(forms.items(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == form, "not the tensor that was announced"
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            for chunk in flat.split(_WRITE_BYTES):
                host = chunk.cpu()
                data = host.numpy().data
                hashed.update(data)
                if form.dtype.is_floating_point and data.nbytes:
                    looks.append((name, hashed.beside(partial(_is_finite, host.view(form.dtype)))))
                file.write(data)
                if data.nbytes >= _LONG_BYTES:
                    file.start_write_back()
        file.fsync()
        written = Written(file.size, hashed.hexdigest())
        bad = list(dict.fromkeys(name for name, look in looks if not look.result()))
    if bad and not_finite is None:
        raise NumericsError(f"{bad[0]} holds values that are not finite: nothing is made of them")
    if not_finite is not None:
        not_finite += bad
    return written


def _is_finite(values: Tensor) -> bool:
    """In one pass without a copy: the smallest and the largest of values with a NaN are NaN."""
    return all(bool(edge.isfinite()) for edge in values.aminmax())


def write_bytes(path: Path, data: bytes, disk: Disk) -> Written:
    """Write and fsync a new file; its size and hash."""
    with disk.create(path) as file, Hasher() as hashed:
        hashed.update(data)
        file.write(data)
        file.fsync()
        return Written(file.size, hashed.hexdigest())
