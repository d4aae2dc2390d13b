"""With which tokenizer a token pair was made, by its `.meta.json`, and whether that is the one at hand.

An id means a word only in the tokenizer that gave it.  Code that combines token files with each
other, with a tokenizer or with a model checks here first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.indexed import IndexedDataset, bin_path
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.storage.reading import read_plain

ALLOW_MISMATCH = "--allow-tokenizer-mismatch"
PIECES, PIECE = (
    8,
    4096,
)  # of a file whose tokenizer was not recorded: pieces looked at, their tokens
MOST_BYTES = 1 << 28  # of a .meta.json, which names every input file
_SHOWN = 3


@dataclass(slots=True)
class KeyCounts:
    """What has been written of one key."""

    documents: int = 0
    empty: int = 0
    sequences: int = 0
    tokens: int = 0
    eods: int = 0
    unknown: int = 0

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> KeyCounts:
        """Those of a `.meta.json`; what an older one did not count is 0."""
        return cls(**{name: facts.get(name, 0) for name in cls.__slots__})


SUMS = (*KeyCounts.__slots__, "input_bytes", "read_bytes", "seconds")


@dataclass(frozen=True, slots=True)
class MadeWith:
    """A tokenizer, told from all others; what is not known is empty or None.

    vocab_size: its own ids, without what --vocab-size adds; source: the first of its files.
    eod: the id that ends a document; ends_documents: it stands behind every document of the pair.
    """

    type: str = ""
    fingerprint: str = ""
    vocab_size: int | None = None
    eod: int | None = None
    source: str = ""
    ends_documents: bool = False

    def __str__(self) -> str:
        words = [self.type or "a tokenizer", *([self.source] if self.source else [])]
        facts = [] if self.vocab_size is None else [f"{self.vocab_size} ids"]
        facts += [] if self.eod is None else [f"end of document {self.eod}"]
        return " ".join(words) + f" ({', '.join([*facts, f'fingerprint {self.fingerprint[:12]}'])})"

    def differs(self, other: MadeWith) -> bool:
        """Their ids mean other words, as far as both are known."""
        pairs = [
            (self.fingerprint, other.fingerprint),
            (self.type, other.type),
            (self.vocab_size, other.vocab_size),
        ]
        if self.ends_documents or other.ends_documents:
            pairs.append((self.eod, other.eod))
        return any(a not in ("", None) and b not in ("", None) and a != b for a, b in pairs)


def made_with(tokenizer: Tokenizer, data: DataConfig) -> MadeWith:
    """The tokenizer that a DataConfig names."""
    try:
        eod: int | None = tokenizer.eod
    except DataError:  # it ends no documents, and may not have to
        eod = None
    source = data.vocab_file if data.tokenizer_type == "GPT2BPETokenizer" else data.tokenizer_model
    return MadeWith(
        data.tokenizer_type, tokenizer.fingerprint(), tokenizer.vocab_size, eod, source or ""
    )


def tokenizer_facts(maker: MadeWith) -> dict[str, Any]:
    """What `.meta.json` keeps of a tokenizer."""
    return {
        name: getattr(maker, name)
        for name in ("type", "vocab_size", "fingerprint", "eod", "source")
    }


def end_of_document(tokenizer: Tokenizer, *, appended: bool = True) -> str:
    """Which id ends a document, in words; appended: it stands in the files."""
    try:
        eod = tokenizer.eod
    except DataError:
        return "the tokenizer has none"
    words = f"id {eod}, {tokenizer.decode([eod])!r}"
    return words if appended else f"{words}, not appended (--append-eod is not given)"


def unknown_token(tokenizer: Tokenizer) -> str:
    """The id for what the vocabulary lacks, in words; empty where there is none."""
    number = tokenizer.unknown
    return "" if number is None else f"id {number}, {tokenizer.decode([number])!r}"


def facts_path(prefix: str | os.PathLike[str]) -> Path:
    """Where the facts of a pair lie."""
    return Path(f"{os.fspath(prefix)}.meta.json")


def read_facts(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The whole `.meta.json` of a pair; None where there is none, DataError where it is damaged."""
    path = facts_path(prefix)
    try:
        found = json.loads(read_plain(path, MOST_BYTES))
        if not isinstance(found, dict):
            raise TypeError("no JSON object")
        kinds = {name: dict for name in ("tokenizer", "sha256", "settings", "skipped")}
        for name, kind in (kinds | dict.fromkeys(SUMS, (int, float))).items():
            if name in found and not isinstance(found[name], kind):
                raise TypeError(f"its {name!r} is {found[name]!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}) - remove it or copy it again") from error
    return found


def maker(facts: Mapping[str, Any] | None) -> MadeWith | None:
    """The tokenizer that the facts name; None where they name none."""
    found = (facts or {}).get("tokenizer", {})
    fingerprint = found.get("fingerprint")
    if not isinstance(fingerprint, str) or not fingerprint:
        return None

    def number(name: str) -> int | None:
        value = found.get(name)
        return value if type(value) is int else None

    return MadeWith(
        type=str(found.get("type") or ""),
        fingerprint=fingerprint,
        vocab_size=number("vocab_size"),
        eod=number("eod"),
        source=str(found.get("source") or ""),
        ends_documents=bool((facts or {}).get("append_eod")),
    )


def maker_of(dataset: IndexedDataset) -> MadeWith | None:
    """The tokenizer of an open pair; DataError where its `.meta.json` describes another pair."""
    facts = read_facts(dataset.prefix)
    tokens = (facts or {}).get("tokens")
    if type(tokens) is int:
        held = bin_path(dataset.prefix).stat().st_size // dataset.dtype.itemsize
        if held != tokens:
            raise DataError(
                f"{facts_path(dataset.prefix)} describes {tokens} tokens, {dataset.prefix}.bin has "
                f"{held}: it belongs to another pair - remove it, or copy all three files again"
            )
    return maker(facts)


def require_same(
    makers: Mapping[str, MadeWith | None], mine: MadeWith | None, *, allowed: bool, whose: str
) -> list[str]:
    """What to say of pairs (by prefix) that are read together, by a tokenizer or a model `mine`.

    Raises DataError where two of them, or one and mine, were made with different tokenizers and
    that is not allowed.  whose: what mine is called, e.g. "this run's tokenizer".
    """
    known = {prefix: found for prefix, found in makers.items() if found is not None}
    if not known:
        return []
    if mine is None or not mine.fingerprint:
        first, mine = next(iter(known.items()))
        beside = f"{first} was made with {mine}"
    else:
        beside = f"{whose} is {mine}"
    wrong = [prefix for prefix, found in known.items() if found.differs(mine)]
    if not wrong:
        return []
    line = (
        f"{facts_path(wrong[0])}: made with {known[wrong[0]]}, but {beside}"
        f"{_more(wrong[1:], 'the same holds for')}"
    )
    if allowed:
        return [f"{ALLOW_MISMATCH}: {line}"]
    raise DataError(
        f"{line}: the same id is another word there - preprocess the text again, give the tokenizer "
        f"the files were made with, or {ALLOW_MISMATCH}"
    )


def told_of_unknown(makers: Mapping[str, MadeWith | None]) -> list[str]:
    """The line about pairs that do not say which tokenizer made them."""
    unknown = [prefix for prefix, found in makers.items() if found is None]
    if not unknown:
        return []
    return [
        f"no .meta.json says which tokenizer made {unknown[0]}{_more(unknown[1:], 'nor')}: only "
        "the ids are compared with the vocabulary"
    ]


def _more(others: Sequence[str], words: str) -> str:
    if not others:
        return ""
    rest = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return f" ({words} {', '.join(others[:_SHOWN])}{rest})"


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror} - check its permissions"
                        ) from error  # fmt: skip


def look_at_ids(dataset: IndexedDataset, vocab_size: int) -> None:
    """DataError where a few evenly spread pieces of the pair hold an id outside the vocabulary."""
    path = bin_path(dataset.prefix)
    kind = dataset.dtype.newbyteorder("<")
    size = path.stat().st_size // kind.itemsize
    with _opened(path) as file:
        for number in range(PIECES):
            start = max(0, size - PIECE) * number // (PIECES - 1)
            file.seek(start * kind.itemsize)
            data = file.read(PIECE * kind.itemsize)
            part = np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind)
            outside = (part < 0) | (part >= vocab_size)
            if outside.any():
                at = int(outside.argmax())
                raise DataError(
                    f"{path}: token {start + at} is token id {part[at]}, the vocabulary has "
                    f"{vocab_size} - use the vocabulary the data was made with"
                )
            if size <= PIECE:
                return
