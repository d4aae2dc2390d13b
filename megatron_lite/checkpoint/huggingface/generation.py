"""generation_config.json: with which ids a text ends and begins, for whoever generates with an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_lite.config.errors import CheckpointError

GENERATION = "generation_config.json"


def generation_config(given: bytes | None, *, eod: int | None, bos: int | None) -> bytes:
    """What came with the model, held against the id that ends a document; without it, that id alone.

    given: the file that was imported with the model.  Where the end is another one now, it counts.
    """
    found = {} if given is None else _read(given)
    ends = found.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    said: dict[str, Any] = {
        "bos_token_id": found.get("bos_token_id", bos),
        "eos_token_id": ends if eod is None or eod in listed else eod,
    }
    if found == found | said:
        return given or b""
    return json.dumps(found | said, indent=2).encode()


def several_ends(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The file that transformers makes up where only config.json says that several ids end texts."""
    ends = config.get("eos_token_id")
    if GENERATION in files or not isinstance(ends, list):
        return {}
    begins = config.get("bos_token_id")
    said = {} if begins is None else {"bos_token_id": begins}
    return {GENERATION: json.dumps(said | {"eos_token_id": ends}, indent=2).encode()}


def _read(given: bytes) -> dict[str, Any]:
    try:
        found = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{GENERATION} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{GENERATION} must hold one JSON object")
    return found
