"""TensorBoard's event file, written directly: no package is needed to write, only to look.

    file   = record*
    record = length u64 | crc(length) u32 | data | crc(data) u32         little-endian (TFRecord)
    data   = protobuf Event: 1 wall_time f64, 2 step i64, 3 file_version | 5 summary
    summary = (1: value)*,  value = 1 tag, 2 simple_value f32

crc is the masked CRC-32C of TFRecord: rotate right by 15 bits and add 0xa282ead8.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_lite.storage.disk import Disk

FLUSH_SECONDS = 10.0

CASTAGNOLI = 0x82F63B78  # CRC-32C's polynomial, bits reversed


def _crc_table() -> tuple[int, ...]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (CASTAGNOLI if entry & 1 else 0)
        table.append(entry)
    return tuple(table)


CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of the bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    """The form in which TFRecord stores a CRC-32C."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    return b"".join(
        [length, struct.pack("<I", masked_crc(length)), data, struct.pack("<I", masked_crc(data))]
    )


def version_event(wall_time: float) -> bytes:
    """The first event of every file."""
    return struct.pack("<Bd", 0x09, wall_time) + _with_length(0x1A, b"brain.Event:2")


def scalar_event(scalars: Mapping[str, float], *, step: int, wall_time: float) -> bytes:
    """All scalars of one step as one event."""
    values = b"".join(
        _with_length(0x0A, _with_length(0x0A, tag.encode()) + struct.pack("<Bf", 0x15, value))
        for tag, value in scalars.items()
    )
    head = struct.pack("<Bd", 0x09, wall_time) + b"\x10" + _varint(step)
    return head + _with_length(0x2A, values)


class EventFile:
    """One `events.out.tfevents.*` in a folder; points wait in a queue and are written together.

    Raises StorageError (exit 5) where the folder cannot be written.
    """

    def __init__(
        self, folder: Path, *, disk: Disk, queue_size: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._queue: list[bytes] = []
        self._queue_size = queue_size
        self._written = clock()
        disk.make_folder(folder)
        # TensorBoard reads the files of a folder in the order of their names: time comes first
        name = (
            f"events.out.tfevents.{int(self._written):010d}.{socket.gethostname()}"
            f".{os.getpid()}.{secrets.token_hex(3)}"
        )
        self.path = folder / name
        self._file = disk.create(self.path)
        self._file.write(framed(version_event(self._written)))

    def add(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Queue one point per scalar; the queue is written when full or ten seconds old."""
        now = self._clock()
        self._queue.append(framed(scalar_event(scalars, step=step, wall_time=now)))
        if len(self._queue) >= self._queue_size or now - self._written >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is queued."""
        data, self._queue = b"".join(self._queue), []
        self._written = self._clock()
        self._file.write(data)

    def close(self) -> None:
        """Write what is queued and close."""
        self.flush()
        self._file.close()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _with_length(key: int, data: bytes) -> bytes:
    return bytes([key]) + _varint(len(data)) + data
