"""Batches of records become batches of tokens, in order, by threads or by worker processes.

read ─▶ parse ─▶ tokenize ─▶ (caller writes)     an engine with threads of its own: one process,
                                                 a thread per stage
read ─▶ [parse, tokenize] x workers ─▶           any other: processes
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.chat.conversation import Renderer, renderer_of
from megatron_lite.data.indexed import token_dtype
from megatron_lite.data.masks import mask_prefix
from megatron_lite.data.preparing.chat_encode import ChatEncoder, ChatJob
from megatron_lite.data.preparing.pair_writer import TokenBatch
from megatron_lite.data.preparing.parts import LONGEST_LINE, RecordBatch, TextUnit
from megatron_lite.data.preparing.records import OnBadLine, ParsedBatch, Reader, Texts, bad_line
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.engines import AUTO, Encoded
from megatron_lite.data.tokenizers.kept import tokenizer_folder

THREADED_BATCH_BYTES = 1 << 20  # per thread; larger ones cost page faults, smaller ones switches
BATCH_BYTES = 1 << 19  # half a second of the slowest tokenizer: every worker ends at the same time
BATCHES_PER_WORKER = 3  # one at work, two waiting: a worker never waits for the reader
SAMPLE_TEXTS, SAMPLE_CHARACTERS = 64, 1 << 16  # compared with the reference at the start
CHECK_EVERY = 16  # batches, of which one text is compared
CHECK_CHARACTERS = 1 << 14

Item = TypeVar("Item")


class WorkerDied(DataError):
    """A worker process is gone; --resume continues from the last mark."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is tokenized and how; travels to every worker."""

    data: DataConfig
    vocab_size: int | None = None
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    template: str | None = None
    on_bad_line: OnBadLine = "error"
    engine: str = AUTO
    text_unit: TextUnit | None = None
    longest: int = LONGEST_LINE
    chat: ChatJob | None = None

    def tokenizer(self) -> Tokenizer:
        """Built anew."""
        return build_tokenizer(self.data, vocab_size=self.vocab_size, engine=self.engine)

    def reader(self) -> Reader:
        """Built anew."""
        return Reader(self.keys, self.template, self.on_bad_line, self.longest)

    @property
    def columns(self) -> list[str]:
        """The keys of a record that are looked at."""
        return self.reader().columns if self.chat is None else self.chat.dialogues().columns

    def pairs(self, prefix: str) -> list[str]:
        """The pairs that are written under an --output-prefix."""
        if self.chat is not None:
            return [prefix, mask_prefix(prefix)]
        return [f"{prefix}_{key}_document" for key in self.keys]

    def renderer(self, tokenizer: Tokenizer) -> Renderer:
        """Of its conversations."""
        assert self.chat is not None, "no conversations are read"
        return renderer_of(tokenizer, tokenizer_folder(self.data), self.chat.template)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A batch as tokens, one TokenBatch per pair; the batch itself without its data.

    told: what there is to count of conversations; ends: the ids that end their answers.
    """

    batch: RecordBatch
    tokens: list[TokenBatch]
    input_bytes: int
    skipped: Counter[str]
    told: Counter[str] = field(default_factory=Counter)
    ends: frozenset[int] = frozenset()


class Encoder:
    """Turns batches of records into token arrays."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self.tokenizer = tokenizer
        self._reader = job.reader()
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eod = tokenizer.eod if job.append_eod else None
        self._batches = 0
        self._chat: ChatEncoder | None = None
        if job.chat is not None:
            self._chat = ChatEncoder(job.chat, job.renderer(tokenizer), self._reader)

    def parse(self, batch: RecordBatch) -> tuple[RecordBatch, ParsedBatch]:
        """The texts of a batch; DataError names file and line."""
        return batch, self._reader.parse(batch)

    def encode(self, item: tuple[RecordBatch, ParsedBatch]) -> EncodedBatch:
        """The tokens of a batch; DataError names file and line."""
        batch, parsed = item
        self._compare(parsed)
        try:
            encoded = [self.tokenizer.encode_batch(key.texts) for key in parsed.keys]
        except DataError:
            parsed = self._without_refused(batch, parsed)
            encoded = [self.tokenizer.encode_batch(key.texts) for key in parsed.keys]
        tokens = [
            self._arrange(batch, parsed, texts, ids)
            for texts, ids in zip(parsed.keys, encoded, strict=True)
        ]
        return EncodedBatch(bare(batch), tokens, _input_bytes(batch, tokens), parsed.skipped)

    def run(self, batch: RecordBatch) -> EncodedBatch:
        """Both steps."""
        if self._chat is None:
            return self.encode(self.parse(batch))
        learned = self._chat.run(batch)
        tokens = learned.tokens(self.tokenizer.vocab_size, self.tokenizer.eod)
        return EncodedBatch(
            bare(batch), tokens, _input_bytes(batch, tokens), learned.skipped, learned.told,
            frozenset(learned.ends),
        )  # fmt: skip

    def _compare(self, parsed: ParsedBatch) -> None:
        """Real text against the reference: many at the start, now and then one more."""
        choice, texts = self.tokenizer.choice, parsed.keys[0].texts
        if self._batches == 0:
            sample, size = [], 0
            for text in texts[:SAMPLE_TEXTS]:
                sample.append(text[:SAMPLE_CHARACTERS])
                size += len(sample[-1])
                if size >= SAMPLE_CHARACTERS:
                    break
            choice.check(sample)
        elif self._batches % CHECK_EVERY == 0 and texts:
            choice.check_again(texts[self._batches % len(texts)][:CHECK_CHARACTERS])
        self._batches += 1

    def _without_refused(self, batch: RecordBatch, parsed: ParsedBatch) -> ParsedBatch:
        """A text the tokenizer refuses makes its record a bad one: an error, or skipped."""
        kept = ParsedBatch([Texts() for _ in parsed.keys], [], parsed.skipped)
        starts = [np.cumsum([0, *key.counts]) for key in parsed.keys]
        for record, line in enumerate(parsed.lines):
            found = [
                key.texts[start[record] : start[record + 1]]
                for key, start in zip(parsed.keys, starts, strict=True)
            ]
            try:
                for texts in found:
                    self.tokenizer.encode_batch(texts)
            except DataError as error:
                if self._job.on_bad_line == "error":
                    raw = batch.data.split(b"\n")[line] if batch.records is None else found
                    raise bad_line(batch, line, raw, str(error)) from error
                parsed.skipped["refused by the tokenizer"] += 1
                continue
            kept.lines.append(line)
            for key, texts in zip(kept.keys, found, strict=True):
                key.texts += texts
                key.counts.append(len(texts))
        return kept

    def _arrange(
        self, batch: RecordBatch, parsed: ParsedBatch, texts: Texts, encoded: Encoded
    ) -> TokenBatch:
        """Lengths and document bounds, EODs in their places, the file's dtype."""
        self._check_range(batch, parsed, encoded.ids)
        tokens = encoded.ids.astype(self._dtype)
        counts = np.array(texts.counts, np.int64)
        lengths, eods = encoded.lengths, 0
        owner = np.repeat(np.arange(len(counts)), counts)
        kept = lengths > 0  # a sentence without tokens is no sequence
        if not kept.all():
            owner, lengths = owner[kept], lengths[kept]
        sequences = np.bincount(owner, minlength=len(counts))
        if self._eod is not None and len(lengths):
            last = np.flatnonzero(np.append(owner[1:] != owner[:-1], True))
            tokens = np.insert(tokens, np.cumsum(lengths)[last], self._eod)
            lengths = lengths.copy()
            lengths[last] += 1
            eods = len(last)
        return TokenBatch(tokens, lengths.astype(np.int32), sequences, eods)

    def _check_range(
        self, batch: RecordBatch, parsed: ParsedBatch, ids: npt.NDArray[np.int32]
    ) -> None:
        size = self.tokenizer.vocab_size
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size):
            first, last = batch.where(parsed.lines[0]), batch.where(parsed.lines[-1])
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise DataError(
                f"{first} to {last}: the tokenizer gave id {wrong}, its vocabulary has {size} - "
                "the tokenizer's files do not belong together"
            )


def bare(batch: RecordBatch) -> RecordBatch:
    """Where it is from, without its data."""
    return replace(batch, data=b"", records=None, numbers=None)


def _input_bytes(batch: RecordBatch, tokens: Sequence[TokenBatch]) -> int:
    return len(batch.data) if batch.records is None else sum(len(t.tokens) for t in tokens)


def ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made by a thread that is at most `depth` items ahead."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[object]] = deque()
        try:
            for _ in range(depth):
                waiting.append(pool.submit(next, source, end))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, source, end))
                yield item  # type: ignore[misc]
        finally:
            for future in waiting:
                future.cancel()


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
    _encoders.append(Encoder(job, job.tokenizer()))


def _run(batch: RecordBatch) -> EncodedBatch:
    return _encoders[0].run(batch)


def encoded_batches(
    job: Job, tokenizer: Tokenizer, batches: Iterator[RecordBatch], workers: int
) -> Generator[EncodedBatch, None, None]:
    """Every batch as tokens, in order; a worker that dies ends the run with a DataError at once."""
    encoder = Encoder(job, tokenizer)
    if tokenizer.choice.engine.threaded and workers > 1 and job.chat is None:
        parsed = ahead(encoder.parse(batch) for batch in batches)
        yield from ahead(encoder.encode(item) for item in parsed)
    elif workers == 1:
        yield from map(encoder.run, batches)
    else:
        yield from in_processes(job, batches, workers)


def in_processes(job: Job, batches: Iterator[RecordBatch], workers: int) -> Iterator[EncodedBatch]:
    """The same by worker processes."""
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_run, batch))
            if len(waiting) >= BATCHES_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process died while tokenizing (killed, or out of memory?) - "
            "nothing was written under a final name; try fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batch_bytes_for(threaded: bool, workers: int) -> int:
    """How much is read at a time."""
    return THREADED_BATCH_BYTES * max(workers, 2) if threaded else BATCH_BYTES
