"""How a text begins for a model: with nothing, or with tokens that stood before every text it was trained on.

The post-processor of a tokenizer.json may put tokens before a text.  Whether they belong there is a fact of a
model, not of a tokenizer: whoever trained with a library that adds them has them, token files have documents
without.  A model's source sets `Tokenizer.begins` to its fact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.data.tokenizers.base import Tokenizer

BEGINS = "begins"
"""Where a manifest keeps it, beside what else it says of the tokenizer: ids; absent where there are none."""
WHOLE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_BARE: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
"""A post-processor that adds nothing."""
_ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as its model sees it; of one without any, the token that ends the document before."""
    return [*tokenizer.begins, *tokenizer.encode(text)] or [tokenizer.eod]


def asked_begin(asked: str, tokenizer: Tokenizer, rows: int) -> tuple[int, ...]:
    """What --first-token says; rows: ids that the model has rows for."""
    if asked == "none":
        return ()
    if asked == "eod":
        return (tokenizer.eod,)
    if not (asked.isascii() and asked.isdigit() and int(asked) < rows):
        raise ConfigError(f"--first-token {asked} must be eod, none, or an id from 0 to {rows - 1}")
    return (int(asked),)


def put_before(content: bytes) -> tuple[int, ...]:
    """What a tokenizer.json puts before every text, as transformers reads it; nothing where it does not say."""
    try:
        return tuple(_before(_object(content).get("post_processor")))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{WHOLE} does not say what stands before a text ({type(error).__name__}: {error}): it is damaged "
            "- copy it again"
        ) from None


def adding_nothing(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same files, by which transformers puts nothing around a text."""
    whole, config = (_object(files.get(name)) for name in (WHOLE, _CONFIG))
    whole["post_processor"] = _without(whole.get("post_processor"))
    config |= {"add_bos_token": False, "add_eos_token": False}
    return {
        **files,
        WHOLE: json.dumps(whole, ensure_ascii=False).encode(),
        _CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _object(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"{}")
    except ValueError:  # said by who reads the file for what is in it
        return {}
    return found if isinstance(found, dict) else {}


def _before(processor: Any) -> Iterator[int]:
    """Ids that a post-processor puts before a text, the first one first."""
    if not isinstance(processor, dict):
        return
    kind = processor.get("type")
    if kind == "Sequence":  # each goes around what those before it have made
        for one in reversed(processor.get("processors") or []):
            yield from _before(one)
    elif kind in ("BertProcessing", "RobertaProcessing"):
        yield int(processor["cls"][1])
    elif kind == "TemplateProcessing":
        for piece in processor["single"]:
            if "SpecialToken" not in piece:
                return
            yield from map(int, processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])


def _without(processor: Any) -> Any:
    if not isinstance(processor, dict):
        return processor
    if processor.get("type") == "Sequence":
        return {**processor, "processors": [_without(p) for p in processor.get("processors") or []]}
    return _BARE if processor.get("type") in _ADDING else processor
