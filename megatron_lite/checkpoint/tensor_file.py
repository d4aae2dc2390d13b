"""Writing the safetensors format through a Disk, hashed on the way; reading goes through the library.

Layout (huggingface/safetensors, format description): u64 header length, JSON header
{name: {dtype, shape, data_offsets}}, then the tensors' bytes, little-endian, without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.hashing import Hasher
from megatron_lite.storage.disk import Disk

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}

_WRITE_BYTES = 16 << 20  # per write: bounds the host copy of a device tensor that is not contiguous


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: its size and content hash."""

    bytes: int
    sha256: str


def file_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that write_tensors will write, to within the length of the names."""
    return sum(t.numel() * t.element_size() + 160 for t in tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor], disk: Disk) -> Written:
    """Write and fsync a new safetensors file of named tensors of any shapes; its size and hash.

    Raises StorageError where the file exists, or cannot be written whole.
    """
    header: dict[str, object] = {}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin 8-byte aligned
    with disk.create(path) as file, Hasher() as hashed:
        for data in (len(text).to_bytes(8, "little"), text):
            hashed.update(data)
            file.write(data)
        for tensor in tensors.values():
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            for chunk in flat.split(_WRITE_BYTES):
                data = chunk.cpu().numpy().data
                hashed.update(data)
                file.write(data)
        file.fsync()
        return Written(file.size, hashed.hexdigest())


def write_bytes(path: Path, data: bytes, disk: Disk) -> Written:
    """Write and fsync a new file; its size and hash."""
    with disk.create(path) as file, Hasher() as hashed:
        hashed.update(data)
        file.write(data)
        file.fsync()
        return Written(file.size, hashed.hexdigest())
