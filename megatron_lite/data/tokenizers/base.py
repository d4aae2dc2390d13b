"""What every tokenizer offers, and the errors all of them share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_lite.config.errors import DataError
from megatron_lite.data.tokenizers.engines import Encoded, EngineChoice
from megatron_lite.storage.reading import read_plain


class Tokenizer(Protocol):
    """Text <-> token ids.  Plain text never gives a special id, whatever it spells."""

    choice: EngineChoice
    """Which library carries it out."""
    begins: Sequence[int]
    """What stands before every text and encode does not give: by its own library, or for the model that it is
    used with (see beginning.py).  Documents of token files have no such token."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: they are 0 .. vocab_size - 1."""
        ...

    @property
    def eod(self) -> int:
        """Id that ends a document; DataError where the vocabulary has none."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Tokens that no text gives, whatever it spells, by what they are written as."""
        ...

    @property
    def unknown(self) -> int | None:
        """Id for what the vocabulary lacks, if it has one."""
        ...

    @property
    def loses_text(self) -> bool:
        """What the vocabulary lacks gives no id at all."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of many texts; equals encode of each."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids: a hash of the files."""
        ...


LARGEST_FILE = 1 << 32
"""Bytes; the largest vocabularies there are have a few hundred million."""


def read_bytes(path: str | None, flag: str) -> bytes:
    """The bytes of a tokenizer's file; DataError names the flag and the path."""
    if path is None:
        raise DataError(f"the tokenizer needs {flag}: give the path of the file")
    try:
        return read_plain(path, LARGEST_FILE)
    except OSError as error:
        raise DataError(
            f"{flag} {path} cannot be read: {error.strerror} - check the path"
        ) from error


def read_json(path: str | None, flag: str) -> Any:
    """A tokenizer's JSON file."""
    try:
        return json.loads(read_bytes(path, flag))
    except ValueError as error:
        raise DataError(f"{flag} {path} is no JSON: {error}") from error


def read_vocab(path: str | None, flag: str = "--vocab-file") -> dict[str, int]:
    """`{"token": id}`; the ids must be 0 .. n - 1, each once."""
    vocab = read_json(path, flag)
    if not isinstance(vocab, dict) or not vocab:
        raise DataError(f'{flag} {path} must hold one JSON object {{"token": id}}')
    wrong = [name for name, number in vocab.items() if type(number) is not int]
    if wrong:
        raise DataError(f"{flag} {path}: the id of {wrong[0]!r} is {vocab[wrong[0]]!r}, no integer")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise DataError(
            f"{flag} {path}: {len(vocab)} tokens must have the ids 0 to {len(vocab) - 1}, each "
            f"once; found {min(vocab.values())} to {max(vocab.values())} with gaps or repeats"
        )
    return vocab


def short_hash(*parts: bytes) -> str:
    """A short hash of some files' bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]
