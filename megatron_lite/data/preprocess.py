"""JSON lines to token files: batches of lines go to workers, arrays come back, one writer writes.

    reader (bytes, cut at newlines) ─▶ workers (parse, tokenize) ─▶ writer, in the order read

The batches depend on the input alone and are written in order, so any number of workers gives
the same bytes.  At most a few batches are under way: memory follows the batch, not the file.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.data import DataConfig
from megatron_lite.config.errors import ConfigError, DataError, StorageError
from megatron_lite.data.indexed import IndexedDataset, bin_path, idx_path, token_dtype
from megatron_lite.data.indexed_builder import IndexedDatasetBuilder
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.storage.disk import Disk

BATCH_BYTES = 1 << 20
BATCHES_PER_WORKER = 3  # one at work, two waiting: a worker never waits for the reader
BOM = b"\xef\xbb\xbf"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What is tokenized and how; travels to every worker."""

    data: DataConfig
    vocab_size: int | None
    keys: tuple[str, ...]
    append_eod: bool


@dataclass(frozen=True, slots=True)
class Lines:
    """A batch of whole lines of one file."""

    path: str
    first_line: int
    data: bytes


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The documents of a batch for one key: tokens, sequence lengths, sequences per document."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int32]
    num_eods: int


@dataclass(slots=True)
class KeySummary:
    """What one key gave."""

    prefix: str
    dtype: str
    documents: int = 0
    empty: int = 0
    sequences: int = 0
    tokens: int = 0
    eods: int = 0


@dataclass(slots=True)
class Summary:
    """What a whole run gave."""

    keys: list[KeySummary] = field(default_factory=list)
    input_bytes: int = 0
    documents: int = 0
    seconds: float = 0.0


def read_batches(paths: Sequence[str], batch_bytes: int = BATCH_BYTES) -> Iterator[Lines]:
    """Batches of whole lines, split on newline only; a byte order mark at the beginning is cut."""
    for path in paths:
        try:
            with open(path, "rb") as file:
                line, first = 1, True
                while data := file.read(batch_bytes):
                    data += file.readline()
                    if first and data.startswith(BOM):
                        data = data[len(BOM) :]
                    first = False
                    yield Lines(path, line, data)
                    line += data.count(b"\n")
        except OSError as error:
            raise DataError(f"--input {path} cannot be read: {error.strerror}") from error


def parse_lines(lines: Lines, keys: Sequence[str]) -> Iterator[tuple[int, list[list[str]]]]:
    """Line number and, for every key, the texts of each record; DataError names file and line."""
    for number, line in enumerate(lines.data.split(b"\n"), start=lines.first_line):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad_line(lines.path, number, line, f"no JSON ({error})") from error
        if not isinstance(record, dict):
            what = f"a JSON {type(record).__name__}, not an object"
            raise bad_line(lines.path, number, line, what)
        try:
            yield number, [texts_of(record, key) for key in keys]
        except ValueError as error:
            raise bad_line(lines.path, number, line, str(error)) from error


def texts_of(record: dict[str, Any], key: str) -> list[str]:
    """The text of a key: a string, or a list of strings that become sequences of their own."""
    if key not in record:
        raise ValueError(f"no key {key!r}, it has {sorted(record)}")
    text = record[key]
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(part, str) for part in texts):
        raise ValueError(f"key {key!r} is {type(text).__name__}, not text or a list of texts")
    for part in texts:
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"key {key!r} holds a lone surrogate") from error
    return texts


def read_records(paths: Sequence[str], keys: Sequence[str]) -> Iterator[list[list[str]]]:
    """For every record the texts of each key, streamed."""
    for lines in read_batches(paths):
        for _, record in parse_lines(lines, keys):
            yield record


class Encoder:
    """Turns batches of lines into token arrays; one per worker."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer: Tokenizer = build_tokenizer(job.data, vocab_size=job.vocab_size)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.eod = self.tokenizer.eod if job.append_eod else None

    def encode(self, lines: Lines) -> list[TokenBatch]:
        """One TokenBatch per key; DataError names file and line."""
        records = list(parse_lines(lines, self.job.keys))
        numbers = [number for number, _ in records]
        return [
            self._tokenize(lines.path, numbers, [record[k] for _, record in records])
            for k in range(len(self.job.keys))
        ]

    def _tokenize(
        self, path: str, numbers: Sequence[int], documents: Sequence[Sequence[str]]
    ) -> TokenBatch:
        flat = [sentence for document in documents for sentence in document]
        try:
            encoded = self.tokenizer.encode_batch(flat)
        except DataError as error:
            raise DataError(f"{path}:{numbers[0]}-{numbers[-1]}: {error}") from error
        per_document = np.fromiter((len(document) for document in documents), np.int64)
        owner = np.repeat(np.arange(len(documents)), per_document)
        kept = encoded.lengths > 0  # a sentence without tokens is no sequence
        owner, lengths = owner[kept], encoded.lengths[kept]
        sequences = np.bincount(owner, minlength=len(documents))
        tokens, num_eods = encoded.ids, 0
        if self.eod is not None and len(lengths):
            last = np.flatnonzero(np.append(owner[1:] != owner[:-1], True))
            ends = np.cumsum(lengths)[last]
            tokens = np.insert(tokens, ends, self.eod)
            lengths[last] += 1
            num_eods = len(last)
        self._check_range(path, numbers, tokens)
        return TokenBatch(
            tokens.astype(self.dtype),
            lengths.astype(np.int32),
            sequences.astype(np.int32),
            num_eods,
        )

    def _check_range(
        self, path: str, numbers: Sequence[int], tokens: npt.NDArray[np.int32]
    ) -> None:
        size = self.tokenizer.vocab_size
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
            raise DataError(
                f"{path}:{numbers[0]}-{numbers[-1]}: the tokenizer gave id {int(tokens.max())}, "
                f"its vocabulary has {size} - the tokenizer's files do not belong together"
            )


def bad_line(path: str, number: int, line: bytes, what: str) -> DataError:
    """The error for one line of the input: where, what, and how it begins."""
    start = line[:80].decode("utf-8", errors="replace")
    return DataError(f"{path}:{number}: {what} - mend or remove the line: {start}")


_encoders: list[Encoder] = []  # of a worker process: made once by _start_worker


def _start_worker(job: Job) -> None:
    """Runs first in a worker: the parent handles Ctrl-C, and no worker outlives its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # the tokenizers library would start threads of its own in every worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _encoders.append(Encoder(job))


def _encode(lines: Lines) -> list[TokenBatch]:
    return _encoders[0].encode(lines)


def encoded_batches(
    job: Job, batches: Iterator[Lines], workers: int
) -> Iterator[tuple[Lines, list[TokenBatch]]]:
    """Every batch with its tokens, in order; one worker works in this process.

    A worker that dies ends the run with a DataError at once.
    """
    if workers == 1:
        encoder = Encoder(job)
        for lines in batches:
            yield lines, encoder.encode(lines)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    waiting: deque[tuple[Lines, Future[list[TokenBatch]]]] = deque()
    try:
        for lines in batches:
            waiting.append((lines, pool.submit(_encode, lines)))
            if len(waiting) >= BATCHES_PER_WORKER * workers:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        while waiting:
            oldest, future = waiting.popleft()
            yield oldest, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died while tokenizing (killed, or out of memory?) - "
            "nothing was written; try fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def preprocess(
    job: Job,
    *,
    inputs: Sequence[str],
    output_prefix: str,
    workers: int,
    disk: Disk,
    overwrite: bool = False,
    batch_bytes: int = BATCH_BYTES,
    progress: Callable[[int, int, float], None] = lambda documents, size, seconds: None,
) -> Summary:
    """Write `{output_prefix}_{key}_document.{bin,idx}` for every key, whole or not at all.

    progress(documents, bytes, seconds) is called after every batch.  ConfigError where an output
    is there and overwrite is not given; DataError for bad input; StorageError for the disk.
    """
    began = time.perf_counter()
    prefixes = [f"{output_prefix}_{key}_document" for key in job.keys]
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix)):
            if path.exists() and not overwrite:
                raise ConfigError(f"{path} is there already - give --overwrite to replace it")
    # a broken tokenizer is found here, before processes are started
    tokenizer = build_tokenizer(job.data, vocab_size=job.vocab_size)
    if job.append_eod:
        assert tokenizer.eod >= 0
    dtype = token_dtype(tokenizer.vocab_size)
    disk.make_folder(Path(output_prefix).absolute().parent)
    summary = Summary([KeySummary(prefix, str(dtype)) for prefix in prefixes])
    with ExitStack() as stack:
        builders = [
            stack.enter_context(IndexedDatasetBuilder(bin_path(prefix), dtype, disk))
            for prefix in prefixes
        ]
        for lines, tokens in encoded_batches(job, read_batches(inputs, batch_bytes), workers):
            for builder, count, batch in zip(builders, summary.keys, tokens, strict=True):
                builder.add_documents(batch.tokens, batch.lengths, batch.sequences)
                _add(count, batch)
            summary.documents += len(tokens[0].sequences)
            summary.input_bytes += len(lines.data)
            progress(summary.documents, summary.input_bytes, time.perf_counter() - began)
        _refuse_nothing(summary, inputs)
        for builder in builders:
            builder.prepare()
        for builder, prefix in zip(builders, prefixes, strict=True):
            builder.publish(idx_path(prefix))
    _verify(summary)
    summary.seconds = time.perf_counter() - began
    return summary


def _add(count: KeySummary, batch: TokenBatch) -> None:
    count.documents += len(batch.sequences)
    count.empty += int((batch.sequences == 0).sum())
    count.sequences += len(batch.lengths)
    count.tokens += len(batch.tokens)
    count.eods += batch.num_eods


def _refuse_nothing(summary: Summary, inputs: Sequence[str]) -> None:
    names = ", ".join(inputs)
    if summary.documents == 0:
        raise DataError(f"{names}: no documents - the input has no line with text")
    for count in summary.keys:
        if count.tokens == 0:
            raise DataError(
                f"{names}: the {count.documents} documents for {count.prefix} have no tokens"
            )


def _verify(summary: Summary) -> None:
    """Read back what was written: a count that differs is the disk's doing."""
    for count in summary.keys:
        written = IndexedDataset(count.prefix)
        found = [
            len(written.document_indices) - 1,
            len(written),
            int(written.sequence_lengths.sum(dtype=np.int64)),
        ]
        expected = [count.documents, count.sequences, count.tokens]
        if found != expected:
            raise StorageError(
                f"{count.prefix}: wrote {expected} documents, sequences and tokens, read back "
                f"{found} - the disk does not keep what is written"
            )
