"""Texts and token files whose perplexity is measured: their documents, as a model sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_lite.config.context_length import beyond_trained
from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.data.indexed import IndexedDataset, bin_path
from megatron_lite.data.provenance import MadeWith, maker_of, require_same
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.beginning import asked_begin
from megatron_lite.data.tokenizers.null import NullTokenizer
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.perplexity import (
    Document,
    Perplexity,
    choose_window,
    measure_perplexity,
    with_first,
)
from megatron_lite.inference.evaluating.results import Result
from megatron_lite.storage.reading import read_plain

_TEXT_BYTES = 1 << 32  # of a text file, which is one document
_BOM = b"\xef\xbb\xbf"


def read_text(path: str, flag: str) -> str:
    """A whole file; DataError names the line where it is no UTF-8."""
    try:
        content = read_plain(path, _TEXT_BYTES).removeprefix(_BOM)
    except OSError as error:
        raise DataError(
            f"{flag} {path} cannot be read: {error.strerror} - check the path"
        ) from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{flag} {path}:{line} is not UTF-8 ({error.reason}): save it as UTF-8"
        ) from None


def text_document(text: str, tokenizer: Tokenizer, first: int | None) -> Document:
    """A text as one document."""
    return Document(with_first(first, tokenizer.encode(text)), len(text.encode()))


def num_scored(dataset: IndexedDataset, first: int | None) -> int:
    """Tokens of a pair that are scored: all, or all but each document's first."""
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    sizes = np.diff(ends[dataset.document_indices])
    return int(sizes.sum() if first is not None else np.maximum(sizes - 1, 0).sum())


def pair_documents(
    dataset: IndexedDataset, tokenizer: Tokenizer, first: int | None, *, rows: int
) -> Iterator[Document]:
    """The documents of a pair; rows: ids that the model has rows for.  DataError for another id."""
    bounds, eod = dataset.document_indices, end_of(tokenizer)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        parts = dataset[int(start) : int(stop)]
        tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        outside = (tokens < 0) | (tokens >= rows)
        if outside.any():
            raise DataError(
                f"{bin_path(dataset.prefix)}: id {tokens[outside.argmax()]} in sequence {start} or behind "
                f"it, the model has rows for {rows} - preprocess the text with the model's tokenizer"
            )
        yield Document(with_first(first, tokens), _bytes_of(tokens, tokenizer, eod))


def first_token(asked: str | None, tokenizer: Tokenizer, rows: int) -> int | None:
    """The token that is seen before a document's own: as asked, else what texts begin with for the model.

    Where they begin with nothing it is the one that ends the document before; none where the tokenizer
    gives every text its begin.
    """
    if asked is not None:
        begins: Sequence[int] = asked_begin(asked, tokenizer, rows)
        return begins[-1] if begins else None
    if tokenizer.begins:
        return tokenizer.begins[-1]
    return None if len(tokenizer.encode("")) else end_of(tokenizer)


def end_of(tokenizer: Tokenizer) -> int | None:
    """The token that ends documents, if there is one."""
    try:
        return tokenizer.eod
    except DataError:  # it ends no documents
        return None


def _bytes_of(tokens: np.ndarray, tokenizer: Tokenizer, eod: int | None) -> int | None:
    """Bytes of the text that the tokens are; ends of documents have none, numbers are no text."""
    if isinstance(tokenizer, NullTokenizer):
        return None
    return len(tokenizer.decode([n for n in tokens.tolist() if n != eod]).encode())


def prefix_of(path: str) -> str:
    """The prefix of a pair, whichever of its files was named."""
    return str(Path(path).with_suffix("")) if path.endswith((".bin", ".idx")) else path


@dataclass(slots=True)
class PerplexityOf:
    """The exam of one file: a text (flag --text), or a pair of token files (--tokens).

    window, stride, first: as asked, None by default; allowed: a pair may have been made with another
    tokenizer than the model's.
    """

    flag: str
    path: str
    window: int | None = None
    stride: int | None = None
    first: str | None = None
    allowed: bool = False
    _documents: Iterator[Document] = field(init=False)
    _total: int = field(init=False)
    _sliding: tuple[int, int] = field(init=False)

    def look(self, model: ModelConfig, tokenizer: Tokenizer) -> Sequence[str]:
        """Texts are read, pairs opened; DataError where no token is left to score."""
        assert model.vocab_size is not None
        limited = model.position_embedding_type == "learned_absolute"
        self._sliding = choose_window(
            self.window, self.stride, positions=model.num_positions, limited=limited
        )
        first = first_token(self.first, tokenizer, model.vocab_size)
        if self.flag == "--text":
            said = self._look_at_text(tokenizer, first)
        else:
            said = self._look_at_pair(tokenizer, first, model.vocab_size)
        if self._total < 1:
            raise DataError(f"{self.flag} {self.path} holds no token to score")
        beyond = beyond_trained(model, min(self._sliding[0], self._total))
        return [*said, *([] if beyond is None else [f"--window: {beyond}"])]

    def _look_at_text(self, tokenizer: Tokenizer, first: int | None) -> Sequence[str]:
        document = text_document(read_text(self.path, self.flag), tokenizer, first)
        self._documents, self._total = iter([document]), len(document.tokens) - 1
        unknown = tokenizer.unknown
        lacking = 0 if unknown is None else int((document.tokens == unknown).sum())
        if not lacking:
            return []
        return [f"{self.path}: {lacking} of {self._total} tokens stand for what the vocabulary lacks, "
                "however much that is: bits per byte mean little"]  # fmt: skip

    def _look_at_pair(self, tokenizer: Tokenizer, first: int | None, rows: int) -> Sequence[str]:
        dataset = IndexedDataset(prefix_of(self.path))
        mine = MadeWith(
            fingerprint=tokenizer.fingerprint(),
            vocab_size=tokenizer.vocab_size,
            eod=end_of(tokenizer),
        )
        said = require_same(
            {dataset.prefix: maker_of(dataset)}, mine, allowed=self.allowed,
            whose="the model's tokenizer",
        )  # fmt: skip
        self._documents = pair_documents(dataset, tokenizer, first, rows=rows)
        self._total = num_scored(dataset, first)
        return said

    def run(self, examinee: Examinee) -> Result:
        """Collective over the model's ranks."""
        window, stride = self._sliding
        with examinee.progress(Path(self.path).name, self._total, "tokens") as told:
            found = measure_perplexity(
                examinee.scorer, self.path, self._documents, window=window, stride=stride, told=told
            )
        assert found.tokens == self._total, (found.tokens, self._total)
        return Result("perplexity", self.path, _rows(found), found.values(), _notes(found))


def _rows(found: Perplexity) -> list[list[str]]:
    bits = found.bits_per_byte
    return [
        ["perplexity of", "tokens", "nats/token", "perplexity", "bits/byte"],
        [found.file, f"{found.tokens:,}", f"{found.loss:.4f}", f"{found.perplexity:,.3f}",
         "-" if bits is None else f"{bits:.4f}"],
    ]  # fmt: skip


def _notes(found: Perplexity) -> list[str]:
    notes = [f"documents: {found.documents:,}; windows of {found.window} tokens: {found.windows:,}"]
    if found.windows > found.documents:
        least = found.window - found.stride + 1
        notes[0] += (
            f", stride {found.stride}: beyond a first window a token sees {least} to {found.window} before it"
        )
    if found.size is None:
        notes.append("bits per byte are not known: the tokenizer's ids are numbers, no text")
    return notes
