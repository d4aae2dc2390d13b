"""Byte-level BPE from ranks: OpenAI's .tiktoken files and Megatron's .json lists, both local.

.tiktoken: one `base64 rank` per line; a token's id is its rank, special tokens come behind.
.json: [{"rank", "token_bytes", "token_str"}, ...]; special tokens come first, ids are shifted.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.data.tokenizers.base import read_bytes, read_json, short_hash
from megatron_lite.data.tokenizers.engines import (
    AUTO,
    Candidate,
    EngineChoice,
    EngineTokenizer,
    GigatokenEngine,
    TiktokenEngine,
    Unavailable,
)

_FLAG = "--tokenizer-model"
JSON_SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
JSON_IDS = 1 << 17  # ids of a .json file in all, unless --vocab-size says otherwise
_EOD = "<|endoftext|>"

_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORDS = (_UPPER + "*" + _LOWER + "+", _UPPER + "+" + _LOWER + "*")
_REST = (r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": "|".join([*(word + _SHORT for word in _WORDS), r"\p{N}{1,3}", *_REST]),
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": "|".join([*_WORDS, r"\p{N}", *_REST]),
}
"""How each published vocabulary cuts text into words; part of what defines its ids."""

GIGATOKEN_NAMES = {"gpt2": "gpt2", "cl100k": "gpt4", "o200k": "o200k"}

_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
PUBLISHED: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": ("gpt2", {_EOD: 50256}),
    "p50k_base": ("gpt2", {_EOD: 50256}),
    "cl100k_base": (
        "cl100k",
        {_EOD: 100257, **dict(zip(_FIM, range(100258, 100261), strict=True)),
         "<|endofprompt|>": 100276},
    ),
    "o200k_base": ("o200k", {_EOD: 199999, "<|endofprompt|>": 200018}),
}  # fmt: skip
"""File name -> pattern and special tokens, which a .tiktoken file does not hold."""
RANKS = {"r50k_base": 50256, "cl100k_base": 100256, "o200k_base": 199998}


@dataclass(frozen=True, slots=True)
class RankedVocabulary:
    """What a file means: ranks, the pattern, special tokens by id, and the shift of the ranks."""

    ranks: dict[bytes, int]
    pattern: str
    specials: dict[str, int]
    eod: str
    shift: int = 0
    size: int = 0


def parse_ranks(path: str) -> dict[bytes, int]:
    """The lines of a .tiktoken file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, _FLAG).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{_FLAG} {path}:{number}: {line[:40]!r} is not `base64 rank`"
            ) from error
    return ranks


def check_ranks(path: str, ranks: dict[bytes, int]) -> None:
    """Ranks are 0 .. n - 1, each once, and all 256 bytes are tokens."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{_FLAG} {path}: the ranks are not 0 to {len(ranks) - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"{_FLAG} {path} lacks {len(missing)} of the 256 bytes, e.g. {missing[0]}")


def read_text_file(path: str, pattern: str | None) -> RankedVocabulary:
    """A .tiktoken file; its name tells the pattern where --tiktoken-pattern does not."""
    ranks = parse_ranks(path)
    check_ranks(path, ranks)
    name = Path(path).name.removesuffix(".tiktoken")
    known, specials = PUBLISHED.get(name, (None, {_EOD: len(ranks)}))
    whole = RANKS.get(name)
    if whole is not None and len(ranks) != whole:
        raise DataError(
            f"{_FLAG} {path} has {len(ranks)} ranks, {name} has {whole}: it is cut off - copy it again, or "
            "give a file of your own another name and --tiktoken-pattern"
        )
    chosen = pattern or known
    if chosen is None:
        raise ConfigError(
            f"--tiktoken-pattern is needed for {path}, which does not hold it: one of "
            f"{', '.join(PATTERNS)}"
        )
    size = 1 + max(len(ranks) - 1, *specials.values())
    return RankedVocabulary(ranks, chosen, specials, _EOD, size=size)


def read_json_file(
    path: str, pattern: str | None, num_special: int, names: Sequence[str], vocab_size: int | None
) -> RankedVocabulary:
    """Megatron's list of ranks (or an object with it under "vocab"), cut to the vocabulary's size."""
    found = read_json(path, _FLAG)
    listed: Any = found.get("vocab") if isinstance(found, dict) else found
    try:
        entries = [(base64.b64decode(entry["token_bytes"]), entry["rank"]) for entry in listed]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{_FLAG} {path}: not a list of rank, token_bytes, token_str") from error
    specials = list(names) or list(JSON_SPECIALS)
    lacking = set(JSON_SPECIALS) - set(specials)
    if lacking or len(set(specials)) != len(specials) or len(specials) > num_special:
        raise ConfigError(
            f"--tiktoken-special-tokens {' '.join(specials)}: at most "
            f"{num_special} (--tiktoken-num-special-tokens) different names, among them "
            f"{' '.join(JSON_SPECIALS)}"
        )
    fillers = (f"<SPECIAL_{number}>" for number in itertools.count(len(specials)))
    specials += itertools.islice(fillers, num_special - len(specials))
    size = min(vocab_size or JSON_IDS, len(entries) + num_special)
    if size - num_special < 256:
        raise ConfigError(
            f"--vocab-size {size} leaves {size - num_special} ranks beside {num_special} special "
            "tokens; at least the 256 bytes are needed"
        )
    ranks = dict(entries[: size - num_special])
    check_ranks(path, ranks)
    by_name = {name: number for number, name in enumerate(specials)}
    return RankedVocabulary(ranks, pattern or "v2", by_name, "</s>", shift=num_special, size=size)


class TikTokenizer(EngineTokenizer):
    """Plain text gives plain tokens: a special token that is spelled out stays text."""

    def __init__(
        self,
        path: str | None,
        *,
        pattern: str | None = None,
        num_special_tokens: int = 1000,
        special_tokens: Sequence[str] = (),
        vocab_size: int | None = None,
        engine: str = AUTO,
    ) -> None:
        content = read_bytes(path, _FLAG)
        assert path is not None
        if pattern is not None and pattern not in PATTERNS:
            raise ConfigError(f"--tiktoken-pattern {pattern}: choose from {', '.join(PATTERNS)}")
        if path.endswith(".json"):
            found = read_json_file(path, pattern, num_special_tokens, special_tokens, vocab_size)
        else:
            found = read_text_file(path, pattern)
        self._vocabulary = found
        self._hash = short_hash(content, json.dumps([found.pattern, found.specials]).encode())
        self._names = {rank + found.shift: token for token, rank in found.ranks.items()}
        self._names |= {number: name.encode() for name, number in found.specials.items()}
        words = PATTERNS[found.pattern]
        self.choice = EngineChoice(
            [
                Candidate("gigatoken", lambda: GigatokenEngine(self._load_gigatoken(path))),
                Candidate(
                    "tiktoken", lambda: TiktokenEngine(found.ranks, words, shift=found.shift)
                ),
            ],
            reference=("tiktoken",),
            asked=engine,
        )

    def _load_gigatoken(self, path: str) -> Any:
        name = GIGATOKEN_NAMES.get(self._vocabulary.pattern)
        if name is None or self._vocabulary.shift:
            raise Unavailable(f"gigatoken does not know the pattern {self._vocabulary.pattern}")
        return lambda kind: kind.from_tiktoken(path, pretokenizer=name, special_tokens={})

    @property
    def vocab_size(self) -> int:
        """Ranks and special tokens; ids between them that are never given count."""
        return self._vocabulary.size

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Those behind or before the ranks."""
        return self._vocabulary.specials

    @property
    def eod(self) -> int:
        """<|endoftext|> of a .tiktoken file, </s> of a .json file."""
        return self._vocabulary.specials[self._vocabulary.eod]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are written out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self._names.get(number, b"") for number in ids).decode(errors="replace")

    def fingerprint(self) -> str:
        """A hash of the file, the pattern and the special tokens."""
        return self._hash
