"""GPT-2's byte-level BPE from a vocab and a merges file.

Text is cut into words by GPT-2's pattern, each word's bytes become printable characters, and the
earliest learned merges join them (Radford et al. 2019, section 2.2).  The fastest library that is
installed does it; a plain version with the `regex` package where there is none, same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

from megatron_lite.config.errors import DataError
from megatron_lite.data.tokenizers.base import read_bytes, read_vocab, short_hash
from megatron_lite.data.tokenizers.engines import (
    AUTO,
    Candidate,
    EngineChoice,
    EngineTokenizer,
    FunctionEngine,
    GigatokenEngine,
    TiktokenEngine,
    TokenizerEngine,
    TokenizersEngine,
    Unavailable,
    missing,
)
from megatron_lite.data.tokenizers.fit import unmade

GPT2_EOD = "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Merge = tuple[str, str]


def byte_characters() -> list[str]:
    """The printable character that stands for each byte: itself, or 256 and up in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def read_merges(path: str | None) -> list[Merge]:
    """The pairs of a merges file, first learned first; a first line `#version` is skipped."""
    try:
        text = read_bytes(path, "--merge-file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--merge-file {path} is no UTF-8: {error}") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    begin = 1 if lines[0].startswith("#version") else 0
    merges = []
    for number, line in enumerate(lines[begin:], start=begin + 1):
        a, _, b = line.partition(" ")
        if a and b and " " not in b:
            merges.append((a, b))
        elif line:
            raise DataError(f"--merge-file {path}:{number}: {line!r} is not two tokens")
    return merges


class PlainBPE:
    """The merges carried out in Python: slow, but only the `regex` package is needed."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[Merge]) -> None:
        import regex  # noqa: PLC0415  an optional extra

        self._words = regex.compile(WORDS)
        self._vocab = vocab
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._characters = byte_characters()
        self._encode_word = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return [token for word in self._words.findall(text) for token in self._encode_word(word)]

    def _merge(self, word: str) -> list[int]:
        parts = [self._characters[byte] for byte in word.encode("utf-8")]
        last = len(self._ranks)
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, last) for pair in zip(parts, parts[1:], strict=False)]
            first = min(ranks)
            if first == last:
                break
            # every place of the best pair at once, from left to right
            merged, at = [], 0
            while at < len(parts):
                if at < len(ranks) and ranks[at] == first:
                    merged.append(parts[at] + parts[at + 1])
                    at += 2
                else:
                    merged.append(parts[at])
                    at += 1
            parts = merged
        return [self._vocab[part] for part in parts]


def library_bpe(vocab: dict[str, int], merges: Sequence[Merge]) -> TokenizersEngine:
    """The same by the `tokenizers` library."""
    try:
        import tokenizers  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise missing("tokenizers", "tokenizers") from error
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return TokenizersEngine(fast)


def gpt2_tokenizer_json(vocab: dict[str, int], merges: Sequence[Merge]) -> bytes:
    """Vocabulary and merges as a tokenizer.json, which gigatoken reads."""
    words = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": words, "model": model}
    try:
        import orjson  # noqa: PLC0415  an optional extra

        return orjson.dumps(whole)
    except (ImportError, TypeError):  # TypeError: half of a UTF-16 pair, which the reader refuses
        return json.dumps(whole).encode()


def ranks_of(vocab: dict[str, int], merges: Sequence[Merge]) -> dict[bytes, int]:
    """Bytes -> id for tiktoken, which merges by lowest id: only if ids follow the merges."""
    ids = [vocab[a + b] for a, b in merges]
    ordered = all(first < second for first, second in zip(ids, ids[1:], strict=False))
    singles = [vocab[character] for character in byte_characters()]
    if not ordered or (ids and max(singles) > ids[0]):
        raise Unavailable("tiktoken cannot carry out merges whose ids are in another order")
    number = {character: byte for byte, character in enumerate(byte_characters())}
    names = [*byte_characters(), *(a + b for a, b in merges)]
    return {bytes(number[character] for character in name): vocab[name] for name in names}


def plain_bpe(vocab: dict[str, int], merges: Sequence[Merge]) -> TokenizerEngine:
    """Our own version."""
    try:
        return FunctionEngine("plain", PlainBPE(vocab, merges).encode)
    except ImportError as error:
        raise missing("regex", "tokenizers") from error


class GPT2BPETokenizer(EngineTokenizer):
    """`engine` names one of the libraries, or "plain" for the Python version."""

    def __init__(
        self, vocab_file: str | None, merge_file: str | None, *, engine: str = AUTO
    ) -> None:
        self._vocab_file = vocab_file
        self._vocab = vocab = read_vocab(vocab_file)
        merges = read_merges(merge_file)
        self._names = [name for name, _ in sorted(vocab.items(), key=lambda item: item[1])]
        self._bytes = {character: byte for byte, character in enumerate(byte_characters())}
        self._check(merges, merge_file)
        self._hash = short_hash(
            read_bytes(vocab_file, "--vocab-file"), read_bytes(merge_file, "--merge-file")
        )
        self.choice = EngineChoice(
            [
                Candidate(
                    "gigatoken",
                    lambda: GigatokenEngine(
                        lambda t: t.from_json(gpt2_tokenizer_json(vocab, merges))
                    ),
                ),
                Candidate("tiktoken", lambda: TiktokenEngine(ranks_of(vocab, merges), WORDS)),
                Candidate("tokenizers", lambda: library_bpe(vocab, merges)),
                Candidate("plain", lambda: plain_bpe(vocab, merges)),
            ],
            reference=("tokenizers", "plain"),
            asked=engine,
        )

    def _check(self, merges: Sequence[Merge], merge_file: str | None) -> None:
        for a, b in merges:
            for part in (a, b, a + b):
                if part not in self._vocab:
                    raise DataError(
                        f"--merge-file {merge_file}: the merge {a!r} {b!r} needs {part!r}, which "
                        f"--vocab-file {self._vocab_file} lacks - the two belong to different "
                        "vocabularies"
                    )
        lacking = [c for c in byte_characters() if c not in self._vocab]
        if lacking:
            raise DataError(
                f"--vocab-file {self._vocab_file} lacks {len(lacking)} of the 256 byte tokens, "
                f"e.g. {lacking[0]!r} - it is no byte-level vocabulary"
            )
        orphans = unmade(self._vocab, merges, self._spell)
        if orphans:
            raise DataError(
                f"--merge-file {merge_file}: none of its {len(merges)} merges makes {len(orphans)} of "
                f"the {len(self._vocab)} tokens of --vocab-file {self._vocab_file}, e.g. "
                f"{orphans[0]!r} (id {self._vocab[orphans[0]]}): it is cut off, or belongs to another "
                "vocabulary - copy both files again"
            )

    def _spell(self, token: str) -> str | None:
        """As text; bytes that are no whole character are part of a word, too."""
        if not all(character in self._bytes for character in token):
            return None
        try:
            return bytes(self._bytes[character] for character in token).decode("utf-8")
        except UnicodeDecodeError:
            return "part"

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._vocab)

    @property
    def eod(self) -> int:
        """The id of <|endoftext|>."""
        if GPT2_EOD not in self._vocab:
            raise DataError(
                f"--vocab-file {self._vocab_file} has no {GPT2_EOD!r}, the end-of-document token"
            )
        return self._vocab[GPT2_EOD]

    @property
    def special_ids(self) -> Mapping[str, int]:
        """<|endoftext|>."""
        return {GPT2_EOD: self._vocab[GPT2_EOD]} if GPT2_EOD in self._vocab else {}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; <|endoftext|> is written out, broken UTF-8 becomes U+FFFD."""
        data = bytearray()
        for number in ids:
            name = self._names[number]
            if all(character in self._bytes for character in name):
                data += bytes(self._bytes[character] for character in name)
            else:  # a special token
                data += name.encode("utf-8")
        return data.decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """A hash of both files."""
        return self._hash
