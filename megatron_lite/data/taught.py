"""How the conversations of a run's data were written: what is kept with a model that learns from them.

A model speaks as it was taught.  The template's text and the ids that end an answer come from the
`.meta.json` of the data and go into every checkpoint beside the tokenizer, where chat, server and
exports find them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_lite.config.blend import named_prefixes
from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.provenance import facts_path, read_facts
from megatron_lite.data.tokenizers.huggingface import GENERATION, TEMPLATE
from megatron_lite.data.tokenizers.statements import json_object

NOT_TAUGHT = (
    "no .meta.json of the data says by which chat template they were written: none is kept with the model, so "
    "that chat, server and exports take the tokenizer's - keep each pair's .meta.json beside it"
)
"""Said where a run of conversations does not know."""


class Taught(NamedTuple):
    """text: the chat template; ends: ids that end an answer, sorted."""

    text: str
    ends: tuple[int, ...]


def taught_of(prefix: str) -> Taught | None:
    """Of one pair; None where its facts say nothing of conversations."""
    found = (read_facts(prefix) or {}).get("chat")
    if found is None:
        return None
    try:
        text, ends = found["text"], found["ends"]
        if not isinstance(text, str) or any(type(end) is not int for end in ends):
            raise TypeError
    except (KeyError, TypeError):
        raise DataError(
            f"{facts_path(prefix)}: its 'chat' has no 'text' of a template and no list of 'ends' - "
            "write the pair anew with tools/preprocess_data.py --chat"
        ) from None
    return Taught(text, tuple(sorted(ends)))


def taught(data: DataConfig) -> Taught | None:
    """Of all pairs that a run reads; DataError where they were written in two ways."""
    return taught_alike({prefix: taught_of(prefix) for prefix in named_prefixes(data)})


def taught_alike(ways: Mapping[str, Taught | None]) -> Taught | None:
    """What the pairs (by prefix) have in common; DataError where they were written in two ways."""
    known = {prefix: way for prefix, way in ways.items() if way is not None}
    if not known:
        return None
    first, way = next(iter(known.items()))
    for prefix, other in known.items():
        if other.text != way.text:
            raise DataError(
                f"{prefix} and {first} were written with two chat templates: a model speaks in one - "
                "preprocess both with the same --chat-template"
            )
    ends = sorted({end for other in known.values() for end in other.ends})
    return Taught(way.text, tuple(ends))


def spoken_files(folder: Path) -> dict[str, bytes]:
    """What files_with() has added to a folder of tokenizer files, for what is exported without these."""
    found = {name: folder / name for name in (TEMPLATE, GENERATION)}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def files_with(
    files: Mapping[str, bytes], way: Taught | None, eods: Sequence[int]
) -> dict[str, bytes]:
    """The files to keep with a model: those of its tokenizer, its template, and what ends its answers.

    eods: the ids that end a text, besides.
    """
    if way is None:
        return dict(files)
    given = json_object(files.get(GENERATION, b"{}"), f"{GENERATION} beside the tokenizer")
    before = given.get("eos_token_id")
    listed = before if isinstance(before, list) else [] if before is None else [before]
    ends = list(dict.fromkeys([*listed, *eods, *way.ends]))
    said = {**given, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    generation = json.dumps(said, indent=2).encode()
    return {**files, TEMPLATE: way.text.encode(), GENERATION: generation}
