"""Whether the files of a tokenizer belong together: mismatched ones still give ids, but wrong ones.

A byte-pair vocabulary is the bytes, what merges make of them, and special tokens.  A word of text
that no merge makes is never given: the merges were cut, or are another vocabulary's.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from megatron_lite.config.errors import DataError

_MOST = 0.05  # of the merged tokens of a vocabulary that is not byte-level: some have pieces of old
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")

Spell = Callable[[str], "str | None"]
"""A token of the vocabulary as text; None where it stands for no text."""


def is_one_word(text: str) -> bool:
    """GPT-2's pattern does not cut it, so that merges could make it; most special tokens are cut."""
    kinds = {_kind(character) for character in text}
    if kinds == {"space"} or text in _CONTRACTIONS:
        return True
    return len({_kind(character) for character in text.removeprefix(" ")}) == 1


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "other"


def unmade(
    vocab: Collection[str], merges: Iterable[tuple[str, str]], spell: Spell, *, join: str = ""
) -> list[str]:
    """Tokens of several characters that are one word of text, and that no merge makes.

    join: what the second part of a merge leaves away (`continuing_subword_prefix`).
    """
    made = {a + b.removeprefix(join) for a, b in merges}
    found = []
    for token in vocab:
        if len(token) > 1 and token not in made:
            text = spell(token)
            if text is not None and is_one_word(text):
                found.append(token)
    return found


def check_json(found: dict[str, Any], where: str) -> None:
    """DataError where the merges of a tokenizer.json do not make its vocabulary."""
    model = found.get("model") or {}
    vocab, listed = model.get("vocab"), model.get("merges")
    if model.get("type", "BPE") != "BPE" or model.get("ignore_merges"):
        return
    if not isinstance(vocab, dict) or not isinstance(listed, list):
        return
    pairs = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in listed]
    if any(len(pair) != 2 for pair in pairs):
        return  # the library says what is wrong with it
    added = {token.get("content") for token in found.get("added_tokens") or []}
    begin = model.get("continuing_subword_prefix") or ""
    end = model.get("end_of_word_suffix") or ""
    by_bytes = "ByteLevel" in set(_types(found))

    def spell(token: str) -> str | None:
        if token in added or (token.startswith("<0x") and token.endswith(">")):
            return None
        core = token.removeprefix(begin).removesuffix(end)
        return core.replace("Ġ", " ").replace("▁", " ") if len(core) > 1 else None

    orphans = unmade(vocab, pairs, spell, join=begin)  # type: ignore[arg-type]
    several = sum(len(token) > 1 for token in vocab)
    if len(orphans) > (0 if by_bytes else _MOST * several):
        raise DataError(
            f"{where}: no merge makes {len(orphans)} of the {several} tokens of several characters, "
            f"e.g. {orphans[0]!r} (id {vocab[orphans[0]]}): of {len(pairs)} merges some are missing "
            "- copy the file again, or list what is a special token in its added_tokens"
        )


def _types(found: dict[str, Any]) -> Iterator[str]:
    for name in ("pre_tokenizer", "decoder"):
        part = found.get(name) or {}
        for one in (part, *(part.get("pretokenizers") or ()), *(part.get("decoders") or ())):
            yield str(one.get("type"))


def check_whole_model(content: bytes, where: str) -> None:
    """DataError where a SentencePiece model ends before its settings, which stand behind the pieces."""
    if not content:
        raise DataError(f"{where} is empty - copy it again")
    fields, at = set(), 0
    try:
        while at < len(content):
            tag, at = _varint(content, at)
            size, at = _varint(content, at)
            if tag & 7 != 2:  # all of its fields are messages
                return  # the library says what is wrong with it
            fields.add(tag >> 3)
            at += size
    except IndexError:
        return
    if at == len(content) and 1 in fields and not {2, 3} <= fields:
        raise DataError(
            f"{where} ends behind its pieces, without the settings that follow them: the file is "
            f"cut off at {len(content)} bytes - copy it again"
        )


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
