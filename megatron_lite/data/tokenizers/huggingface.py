"""Any tokenizer of the `tokenizers` library, from a local tokenizer.json or its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.extras import how_to_install
from megatron_lite.data.tokenizers.base import read_bytes, read_json, short_hash
from megatron_lite.data.tokenizers.beginning import put_before
from megatron_lite.data.tokenizers.engines import (
    AUTO,
    Candidate,
    EngineChoice,
    EngineTokenizer,
    GigatokenEngine,
    TokenizersEngine,
)
from megatron_lite.data.tokenizers.fit import check_json

_FLAG = "--tokenizer-model"
EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that may name special tokens."""
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
ALONG = (TEMPLATE, "chat_template.json", GENERATION)
"""Files that say how a model is spoken with; no tokenizer reads them, and they come out as they went in."""


def token_name(config: Any, key: str, path: Path) -> str | None:
    """A special token's text, which files give as it is or with its properties.

    DataError where the end of a document is given in no such way: it would be guessed.
    """
    if not isinstance(config, dict):
        raise DataError(f"{path} must hold one JSON object")
    found = config.get(key)
    name = found.get("content") if isinstance(found, dict) else found
    if key == "eos_token" and found is not None and not isinstance(name, str):
        raise DataError(
            f"{path}: eos_token is {json.dumps(found)[:80]}, no text of a token - correct it, or remove it"
        )
    return name if isinstance(name, str) else None


def find_tokenizer_json(path: str | None) -> Path:
    """The tokenizer.json a file or folder name means."""
    if path is None:
        raise DataError(f"HuggingFaceTokenizer needs {_FLAG}: a folder or tokenizer.json on disk")
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"{_FLAG} {path}: {file} does not exist - give a local folder or file, "
            "names on a hub are not downloaded"
        )
    return file


def count_ids(path: str | None) -> int:
    """Ids of a tokenizer.json, added tokens included, without the library."""
    found = read_json(str(find_tokenizer_json(path)), _FLAG)
    try:
        vocab = found["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        added = (token["id"] for token in found.get("added_tokens") or [])
        return 1 + max(int(number) for number in [*ids, *added])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{_FLAG} {path} is no tokenizer.json: it has no model.vocab") from error


def without_specials(content: bytes) -> str:
    """A tokenizer.json in which text that spells a special token is text."""
    found = json.loads(content)
    added = found.get("added_tokens") or []
    found["added_tokens"] = [token for token in added if not token.get("special")]
    return json.dumps(found, ensure_ascii=False)


class HuggingFaceTokenizer(EngineTokenizer):
    """Encodes without adding special tokens; the end of a document is the configured eos token."""

    def __init__(self, path: str | None, *, engine: str = AUTO) -> None:
        self._file = find_tokenizer_json(path)
        try:
            import tokenizers  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise ConfigError(
                "HuggingFaceTokenizer needs the package `tokenizers`: "
                f"{how_to_install('tokenizers')}"
            ) from error
        self._size = count_ids(path)
        self._content = read_bytes(str(self._file), _FLAG)
        try:
            self._fast: Any = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for a broken file
            raise DataError(f"{_FLAG} {self._file} cannot be loaded: {error}") from error
        found = json.loads(self._content)
        check_json(found, f"{_FLAG} {self._file}")
        self._model: dict[str, Any] = found.get("model") or {}
        self._bytewise = "ByteLevel" in json.dumps(
            [found.get("pre_tokenizer"), found.get("decoder")]
        )
        self._special = {
            str(token["content"]): int(token["id"])
            for token in found.get("added_tokens") or []
            if token.get("special")
        }
        self._named_eos()
        self.begins = put_before(self._content)
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # text that spells one stays text
        self.choice = EngineChoice(
            [
                Candidate(
                    "gigatoken",
                    lambda: GigatokenEngine(lambda t: t.from_json(without_specials(self._content))),
                ),
                Candidate("tokenizers", lambda: TokenizersEngine(self._fast)),
            ],
            reference=("tokenizers",),
            asked=engine,
        )

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included."""
        return self._size

    @property
    def eod(self) -> int:
        """eos_token of tokenizer_config.json, else the first usual name the vocabulary has."""
        named = self._named_eos()
        if named is not None:
            return named
        for name in EOD_NAMES:
            number = self._fast.token_to_id(name)
            if number is not None:
                return int(number)
        raise DataError(
            f"{_FLAG} {self._file} has no end-of-document token: neither eos_token in "
            f"tokenizer_config.json nor one of {', '.join(EOD_NAMES)}"
        )

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The added tokens that tokenizer.json calls special."""
        return self._special

    def _named_eos(self) -> int | None:
        """The id of the eos_token that the files beside name; DataError where it has none."""
        names = {}
        for beside in BESIDE:
            path = self._file.with_name(beside)
            if path.is_file():
                name = token_name(read_json(str(path), _FLAG), "eos_token", path)
                if name is not None:
                    names[beside] = name
        if not names:
            return None
        (where, name), *others = names.items()
        if any(other != name for _, other in others):
            raise DataError(
                f"{self._file.parent}: eos_token is {name!r} by {where} and {others[0][1]!r} by "
                f"{others[0][0]} - correct the one that is wrong"
            )
        number = self._fast.token_to_id(name)
        if number is None:
            raise DataError(
                f"{self._file.with_name(where)} names the eos_token {name!r}, which {self._file.name} "
                f"of {self._size} ids lacks: no id would end a document - correct eos_token, or add "
                "the token to the tokenizer"
            )
        return int(number)

    @property
    def unknown(self) -> int | None:
        """The id of the model's unk_token."""
        if type(self._model.get("unk_id")) is int:
            return int(self._model["unk_id"])
        number = self._fast.token_to_id(self._model.get("unk_token") or "")
        return None if number is None else int(number)

    @property
    def loses_text(self) -> bool:
        """A byte-pair model of characters without unk_token leaves out what it does not know."""
        of_characters = not self._bytewise and not self._model.get("byte_fallback")
        return self._model.get("type") == "BPE" and of_characters and self.unknown is None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens written out."""
        return str(self._fast.decode(list(ids), skip_special_tokens=False))

    def fingerprint(self) -> str:
        """A hash of tokenizer.json."""
        return short_hash(self._content)
