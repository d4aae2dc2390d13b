"""The pieces of a SentencePiece .model file, read and appended to; the rest of it is left as it is.

A model is a protobuf message: field 1 is a piece (text 1, score 2, kind 3), 2 the trainer's settings
(of which 3 is the kind of model), 3 the normaliser (2 replaced characters, 3 a space in front, 4 spaces
made one).  https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_lite.config.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class ModelPiece(NamedTuple):
    """A piece, with the score by which it is preferred and what it is."""

    text: str
    score: float
    kind: int = NORMAL


class _Field(NamedTuple):
    number: int
    value: int | bytes
    raw: bytes


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model's pieces in the order of their ids; rest: the bytes of all other fields.

    What happens to a text before it is cut: whether characters are replaced, a space is put in front,
    and several spaces become one.
    """

    pieces: tuple[ModelPiece, ...]
    raw_pieces: bytes
    rest: bytes
    is_bpe: bool
    replaces: bool
    space_in_front: bool
    joins_spaces: bool

    @classmethod
    def read(cls, content: bytes, where: str) -> ModelFile:
        """DataError where the bytes are no such file."""
        try:
            fields = list(_fields(content))
            pieces = tuple(_piece(field.value) for field in fields if field.number == 1)
            trainer = next((f.value for f in fields if f.number == 2), b"")
            kind = next((f.value for f in _fields(trainer) if f.number == 3), 1)
            normalizer = next((f.value for f in fields if f.number == 3), b"")
            before = {f.number: f.value for f in _fields(normalizer)}
        except (ValueError, struct.error, TypeError) as error:
            raise DataError(f"{where} is no SentencePiece model: {error}") from error
        return cls(
            pieces,
            b"".join(field.raw for field in fields if field.number == 1),
            b"".join(field.raw for field in fields if field.number != 1),
            kind == _BPE,
            replaces=bool(before.get(2)),
            space_in_front=bool(before.get(3, 1)),
            joins_spaces=bool(before.get(4, 1)),
        )

    def with_pieces(self, added: Sequence[ModelPiece]) -> bytes:
        """The file with more pieces behind its own, whose ids stay what they are."""
        return self.raw_pieces + b"".join(map(encode_piece, added)) + self.rest


def _fields(content: int | bytes) -> Iterator[_Field]:
    if isinstance(content, int):
        raise ValueError("a number stands where a message belongs")
    at = 0
    while at < len(content):
        begin = at
        tag, at = _read_varint(content, at)
        value: int | bytes
        if tag & 7 == _VARINT:
            value, at = _read_varint(content, at)
        elif tag & 7 in (_FIXED64, _FIXED32):
            value, at = content[at : at + 8], at + (8 if tag & 7 == _FIXED64 else 4)
        elif tag & 7 == _BYTES:
            size, at = _read_varint(content, at)
            value, at = content[at : at + size], at + size
        else:
            raise ValueError(f"byte {begin} begins no field")
        if at > len(content):
            raise ValueError(f"it is cut off at {len(content)} bytes")
        yield _Field(tag >> 3, value, content[begin:at])


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ValueError(f"it is cut off at {len(content)} bytes")
        value |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return value, at
    raise ValueError(f"the number before byte {at} does not end")


def _piece(content: int | bytes) -> ModelPiece:
    text, score, kind = "", 0.0, NORMAL
    for field in _fields(content):
        if field.number == 1 and isinstance(field.value, bytes):
            text = field.value.decode("utf-8")
        elif field.number == 2 and isinstance(field.value, bytes):
            (score,) = struct.unpack("<f", field.value[:4])
        elif field.number == 3 and isinstance(field.value, int):
            kind = field.value
    return ModelPiece(text, score, kind)


def encode_piece(piece: ModelPiece) -> bytes:
    """A piece as a field of a model."""
    text = piece.text.encode()
    message = _sized(1, text) + b"\x15" + struct.pack("<f", piece.score)
    if piece.kind != NORMAL:
        message += b"\x18" + _varint(piece.kind)
    return _sized(1, message)


def _sized(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(payload)) + payload


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])
