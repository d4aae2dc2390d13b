"""Whether the tokenizer at hand is the one that a model was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config.errors import CheckpointError, ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.provenance import ALLOW_MISMATCH, MadeWith, made_with
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.beginning import BEGINS, put_before
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.exchange import section_for
from megatron_lite.data.tokenizers.statements import (
    compare_statements,
    ends_of,
    json_object,
    read_vocabulary,
)


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


@contextmanager
def part_of_model() -> Iterator[None]:
    """What is wrong with a tokenizer's file in here is wrong with the model's folder that it lies in."""
    try:
        yield
    except DataError as error:
        raise CheckpointError(str(error)) from error


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


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """The tokenizer that lies beside a model of Hugging Face's, held against its config.json.

    eos: the token that its files say ends a document; facts: what a manifest keeps of it; rows: of
    the model.
    tokenizer: None where there is none, or where a library is missing that only using it needs, as
    unseen then says.  notices: what differs and does not matter.
    """

    files: Mapping[str, bytes]
    eos: str | None
    facts: Mapping[str, Any]
    tokenizer: Tokenizer | None
    unseen: ConfigError | None
    notices: tuple[str, ...]
    rows: int

    def section(self, folder: Path) -> dict[str, Any]:
        """Fields of the data section that names its files in this folder; none where there is none."""
        return section_for(self.files, folder, eos=self.eos, rows=self.rows)


def folder_tokenizer(
    folder: Path,
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    *,
    rows: int,
    positions: int,
    default_ends: Mapping[int, str],
) -> FolderTokenizer:
    """The tokenizer of these files, whose folder it is; default_ends: see compare_statements().

    rows, positions: of the model.  Raises DataError where files contradict each other or the model.
    """
    for name in files:
        if name.endswith(".json"):  # also those that nothing here reads: an export takes them along
            json_object(files[name], f"{folder}/{name}")
    vocabulary = read_vocabulary(files, str(folder))
    eos, named = vocabulary.special.get("eos", (None, ""))
    section = section_for(files, folder, eos=eos, rows=rows)
    tokenizer = unseen = None
    facts: dict[str, Any] = {}
    if section:
        data = DataConfig(**section)
        try:
            tokenizer = build_tokenizer(data)
        except ConfigError as error:
            unseen = error
        else:
            maker = made_with(tokenizer, data)
            if maker.eod is not None and vocabulary.eos not in (None, maker.eod):
                raise DataError(
                    f"{folder}: {named} names the eos_token {eos!r}, id {vocabulary.eos}; the tokenizer "
                    f"ends documents with id {maker.eod}: correct it, or add --no-tokenizer"
                )
            facts = {"type": maker.type, "fingerprint": maker.fingerprint, "vocab_size": rows}
            facts |= {} if maker.eod is None else {"eod": maker.eod}
        if data.tokenizer_type == "HuggingFaceTokenizer":
            begins = put_before(files["tokenizer.json"])
            facts |= {BEGINS: list(begins)} if begins else {}
    notices = compare_statements(
        vocabulary, config, eod=facts.get("eod"), rows=rows, positions=positions,
        where=str(folder), default_ends=default_ends,
    )  # fmt: skip
    ends = [end for end in ends_of(config) if end < rows]
    if ends and "eod" not in facts:  # nothing else would know it
        facts |= {"vocab_size": rows, "eod": ends[0]}
    return FolderTokenizer(files, eos, facts, tokenizer, unseen, tuple(notices), rows)
