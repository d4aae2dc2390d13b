"""Whether the tokenizer at hand is the one that a checkpoint was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_lite.config.errors import CheckpointError
from megatron_lite.data.provenance import ALLOW_MISMATCH, MadeWith


def trained_with(kept: Mapping[str, Any]) -> MadeWith | None:
    """What a manifest keeps of its tokenizer; None where it keeps nothing."""
    if not kept.get("fingerprint"):
        return None
    eod = kept.get("eod")
    return MadeWith(
        type=str(kept.get("type") or ""),
        fingerprint=str(kept["fingerprint"]),
        eod=eod if type(eod) is int else None,
        ends_documents=True,
    )


def check_vocabulary(
    kept: Mapping[str, Any],
    rows: int,
    tokenizer: MadeWith,
    *,
    where: str,
    foreign: bool,
    allowed: bool,
) -> list[str]:
    """What to say of a tokenizer beside a model; kept: what its manifest keeps of its own.

    rows: ids the model has rows for; where: the checkpoint; foreign: the tokenizer is not its own.

    Raises CheckpointError with both sizes where the tokenizer gives ids without a row, where it is
    not the one the model was trained with, and where that is not known and a foreign one has fewer.
    """
    ids = tokenizer.vocab_size
    assert ids is not None
    if ids > rows:
        raise CheckpointError(
            f"{tokenizer} gives {ids} ids, {where} has rows for {rows}: {ids - rows} ids would have "
            "no row - give the tokenizer it was trained with"
        )
    before = trained_with(kept)
    if before is None:
        if not foreign or ids == rows:
            return []
        line = f"{tokenizer} gives {ids} ids, {where} has rows for {rows}"
    elif not before.differs(dataclasses.replace(tokenizer, vocab_size=None)):
        return []
    else:
        line = f"{where}, of {rows} ids, was trained with {before}, not with {tokenizer}"
    if not allowed:
        raise CheckpointError(
            f"{line}: the same id is another word there - give the tokenizer it was trained with (it "
            f"lies in the checkpoint's folder tokenizer/), or {ALLOW_MISMATCH}"
        )
    return [f"{ALLOW_MISMATCH}: {line}"]
