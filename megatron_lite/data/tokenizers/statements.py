"""What the files of one folder say about its vocabulary, compared with each other and with a model.

vocab.json, tokenizer.json or tokenizer.model, added_tokens.json ─▶ ids, and the id of every token
tokenizer_config.json, special_tokens_map.json ─▶ special tokens by name, the longest text
config.json ─▶ rows, eos_token_id, positions
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_lite.config.errors import DataError
from megatron_lite.data.tokenizers.huggingface import BESIDE, token_name
from megatron_lite.data.tokenizers.sentencepiece_file import ModelFile

SPECIAL_KINDS = ("eos", "bos", "unk", "pad", "sep", "cls", "mask")
ENDLESS = 1 << 40  # transformers writes 1e30 where no length is known


@dataclass(frozen=True, slots=True)
class StatedVocabulary:
    """Every token's id, and who said so first; special: kind -> (token, file that names it)."""

    ids: Mapping[str, int]
    special: Mapping[str, tuple[str, str]]
    longest: int | None

    @property
    def size(self) -> int:
        """Ids in all: the largest and one."""
        return 1 + max(self.ids.values(), default=-1)

    @property
    def eos(self) -> int | None:
        """The id of the eos_token that a file names."""
        return self.ids.get(self.special["eos"][0]) if "eos" in self.special else None


def read_vocabulary(files: Mapping[str, bytes], where: str) -> StatedVocabulary:
    """DataError where two files give a token different ids, or name two ends of a document."""
    ids: dict[str, int] = {}
    said: dict[str, str] = {}
    for name, token, number in _statements(files, where):
        if ids.setdefault(token, number) != number:
            raise DataError(
                f"{where}: the token {token!r} has the id {ids[token]} by {said[token]} and {number} "
                f"by {name}: they are of two tokenizers - take the folder from where it came once more"
            )
        said.setdefault(token, name)
    special: dict[str, tuple[str, str]] = {}
    longest = None
    for name in (name for name in BESIDE if name in files):
        found = json_object(files[name], f"{where}/{name}")
        for kind in SPECIAL_KINDS:
            named = token_name(found, f"{kind}_token", Path(where) / name)
            if named is None:
                continue
            before, by = special.setdefault(kind, (named, name))
            if before != named and kind == "eos":
                raise DataError(f"{where}: eos_token is {before!r} by {by} and {named!r} by {name}")
        length = found.get("model_max_length")
        if isinstance(length, int | float) and 0 < length < ENDLESS:
            longest = int(length)
    if ids and "eos" in special and special["eos"][0] not in ids:
        token, name = special["eos"]
        raise DataError(
            f"{where}/{name} names the eos_token {token!r}, which none of its {len(ids)} tokens is: no "
            "id would end a document - correct eos_token, or add the token to the tokenizer"
        )
    return StatedVocabulary(ids, special, longest)


def _statements(files: Mapping[str, bytes], where: str) -> Iterator[tuple[str, str, int]]:
    """(file, token, id) wherever one is said."""
    for name in ("vocab.json", "added_tokens.json"):
        if name in files:
            yield from (
                (name, *item) for item in _numbers(json_object(files[name], f"{where}/{name}"))
            )
    if "tokenizer.json" in files:
        name = "tokenizer.json"
        found = json_object(files[name], f"{where}/{name}")
        vocab = (found.get("model") or {}).get("vocab")
        if isinstance(vocab, dict):
            yield from ((name, *item) for item in _numbers(vocab))
        elif isinstance(vocab, list):  # a unigram model: [piece, score]
            yield from ((name, str(entry[0]), number) for number, entry in enumerate(vocab))
        for token in found.get("added_tokens") or ():
            yield name, str(token.get("content")), int(token.get("id"))
    elif "tokenizer.model" in files:
        name = "tokenizer.model"
        pieces = ModelFile.read(files[name], f"{where}/{name}").pieces
        yield from ((name, piece.text, number) for number, piece in enumerate(pieces))
    if "tokenizer_config.json" in files:
        name = "tokenizer_config.json"
        added = json_object(files[name], f"{where}/{name}").get("added_tokens_decoder") or {}
        for number, token in added.items():
            yield name, str(token.get("content")), int(number)


def _numbers(found: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    return ((token, number) for token, number in found.items() if type(number) is int)


def json_object(content: bytes, path: str) -> dict[str, Any]:
    """What a file holds; DataError where it is no JSON object."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold one JSON object")
    return found


def compare_statements(
    vocabulary: StatedVocabulary,
    config: Mapping[str, Any],
    *,
    eod: int | None,
    rows: int,
    positions: int,
    where: str,
    default_ends: Mapping[int, str] = MappingProxyType({}),
) -> list[str]:
    """What to say of a vocabulary beside a model's config.json; eod: what our tokenizer ends with.

    default_ends: the eos_token_id of a config that nobody told another one -> whose default it is.

    Raises DataError where an id would have no row, or the two end documents with different ids.
    """
    if vocabulary.size > rows:
        last = max(vocabulary.ids, key=lambda token: vocabulary.ids[token])
        raise DataError(
            f"{where}: the tokenizer gives {vocabulary.size} ids, up to {vocabulary.size - 1} for "
            f"{last!r}, but the model has {rows} rows (vocab_size): {vocabulary.size - rows} ids have "
            "no row - take the tokenizer that belongs to it, or add --no-tokenizer"
        )
    notices = _compare_ends(
        config, vocabulary.eos if eod is None else eod, rows, where, default_ends
    )
    if not vocabulary.ids:
        return notices
    if vocabulary.size < rows:
        notices.append(
            f"the model has {rows} rows, the tokenizer gives {vocabulary.size} ids: the last "
            f"{rows - vocabulary.size} rows stand for no token"
        )
    for kind, (token, name) in vocabulary.special.items():
        if token not in vocabulary.ids:
            notices.append(f"{name} names the {kind}_token {token!r}, which is no token of it")
    if vocabulary.longest is not None and vocabulary.longest > positions:
        notices.append(
            f"tokenizer_config.json allows texts of {vocabulary.longest} tokens, the model has "
            f"{positions} positions"
        )
    return notices


def ends_of(config: Mapping[str, Any]) -> list[Any]:
    """The ids with which texts end by config.json."""
    found = config.get("eos_token_id")
    return [end for end in (found if isinstance(found, list) else [found]) if end is not None]


def _compare_ends(
    config: Mapping[str, Any],
    eod: int | None,
    rows: int,
    where: str,
    default_ends: Mapping[int, str],
) -> list[str]:
    ends = ends_of(config)
    outside = [end for end in ends if type(end) is not int or not 0 <= end < rows]
    known = [end for end in outside if type(end) is int and end in default_ends]
    if outside and outside != known[:1]:
        raise DataError(
            f"{where}: eos_token_id {outside[0]!r} in config.json is no row of {rows} (vocab_size): "
            "correct it"
        )
    if outside:
        return [
            f"eos_token_id {outside[0]}, {default_ends[outside[0]]}'s default, is left out: the model has "
            f"{rows} rows"
        ]
    if ends and eod is not None and eod not in ends:
        raise DataError(
            f"{where}: texts end with id {', '.join(map(str, ends))} by config.json (eos_token_id) and "
            f"with id {eod} by the tokenizer: correct the one that is wrong, or add --no-tokenizer"
        )
    return []
