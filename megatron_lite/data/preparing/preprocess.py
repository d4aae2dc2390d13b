"""A corpus to token files: whole or not at all, the same bytes however the work is divided.

    read_batches ─▶ encoded_batches (threads or processes) ─▶ PairWriter per key ─▶ publish
                                                    └─ a mark every few seconds: --resume

What depends on --workers is only who does the work: batches are written in the order read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.config.errors import ConfigError, DataError, StorageError
from megatron_lite.data.indexed import IndexedDataset, bin_path, idx_path, token_dtype
from megatron_lite.data.masks import MASK_DTYPE, MASK_SUFFIX
from megatron_lite.data.preparing.chat_encode import WEIGHTLESS
from megatron_lite.data.preparing.chat_facts import chat_facts, chat_settings
from megatron_lite.data.preparing.encode import (
    EncodedBatch,
    Job,
    WorkerDied,
    batch_bytes_for,
    encoded_batches,
)
from megatron_lite.data.preparing.inputs import plan_inputs, read_batches
from megatron_lite.data.preparing.pair_writer import PairWriter, verify_written
from megatron_lite.data.preparing.parts import LONGEST_LINE, InputPart, InputPlace
from megatron_lite.data.preparing.room import require_room_for_rest
from megatron_lite.data.preparing.streams import size_of
from megatron_lite.data.preparing.summary import Summary
from megatron_lite.data.provenance import (
    KeyCounts,
    end_of_document,
    made_with,
    tokenizer_facts,
    unknown_token,
)
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.storage.disk import Disk, write_atomically

MARK_SECONDS = 15.0  # what a killed run loses at most, besides the batches in flight
JOURNAL = "journal.json"

_log = logging.getLogger(__name__)


class ResumeRefused(ConfigError):
    """--resume with other settings; what the interrupted run left stays."""


ReportProgress = Callable[[Summary], None]


def preprocess(
    job: Job,
    *,
    inputs: Sequence[str],
    output_prefix: str,
    workers: int,
    disk: Disk,
    overwrite: bool = False,
    resume: bool = False,
    shard: tuple[int, int] | None = None,
    batch_bytes: int | None = None,
    mark_seconds: float = MARK_SECONDS,
    progress: ReportProgress = lambda summary: None,
) -> Summary:
    """Write `{output_prefix}_{key}_document.{bin,idx,meta.json}` for every key, whole or not at all.

    Of conversations `{output_prefix}` and its loss mask (data/masks.py).

    progress is called after every batch.  ConfigError where an output is there and overwrite is
    not given, or where resume is asked for with other settings; DataError for bad input;
    StorageError for the disk.  An interrupted run leaves a hidden folder with which resume goes
    on; a failed one leaves nothing.
    """
    began = time.perf_counter()
    prefix = output_prefix if shard is None else shard_prefix(output_prefix, shard)
    run = PreprocessRun(job, inputs, prefix, disk, shard)
    if resume and run.is_finished():
        return run.summary
    run.refuse_to_replace(overwrite=overwrite, resume=resume)
    with run.workplace(resume):
        summary = run.summary
        if not run.published:
            threaded = run.tokenizer.choice.engine.threaded
            size = batch_bytes or batch_bytes_for(threaded, workers)
            batches = read_batches(
                run.parts, size, start=run.place, columns=job.columns, longest=job.longest
            )
            with contextlib.closing(
                encoded_batches(job, run.tokenizer, batches, workers)
            ) as results:
                marked = time.perf_counter()
                for number, result in enumerate(results):
                    run.add(result)
                    if number == 0:
                        left = summary.total_bytes - summary.read_bytes
                        require_room_for_rest(result, left, run.folder.parent, disk)
                    summary.seconds = time.perf_counter() - began
                    progress(summary)
                    if time.perf_counter() - marked >= mark_seconds:
                        run.mark()
                        marked = time.perf_counter()
            summary.seconds = time.perf_counter() - began
            run.complete()
        run.publish()
        summary.seconds = time.perf_counter() - began
    return summary


def shard_prefix(prefix: str, shard: tuple[int, int]) -> str:
    """The prefix of one shard's files; sorted by name the shards are in order."""
    index, count = shard
    digits = len(str(count))
    return f"{prefix}_{index:0{digits}}-of-{count}"


class PreprocessRun:
    """One run's files, counts and place in the input."""

    def __init__(
        self,
        job: Job,
        inputs: Sequence[str],
        prefix: str,
        disk: Disk,
        shard: tuple[int, int] | None,
    ) -> None:
        self.job, self.inputs, self.disk, self.shard = job, inputs, disk, shard
        self.parts: list[InputPart] = plan_inputs(inputs, shard, unit=job.text_unit)
        # a broken tokenizer is found here, before anything is written
        self.tokenizer: Tokenizer = job.tokenizer()
        if job.append_eod:
            assert self.tokenizer.eod >= 0
        self.made_with = made_with(self.tokenizer, job.data)
        if self.tokenizer.loses_text:
            _log.warning(
                "note: %s leaves out characters that its vocabulary lacks, and has no unknown token to "
                "count them by", self.made_with,
            )  # fmt: skip
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.place = InputPlace()
        self.published = False
        path = Path(prefix).absolute()
        self.folder = path.with_name(f".{path.name}.partial")
        self.prefixes = job.pairs(prefix)
        self.dtypes = [self.dtype] * len(self.prefixes)
        self.ends: set[int] = set()
        if job.chat is not None:
            self.dtypes[1] = MASK_DTYPE
            self.renderer = job.renderer(self.tokenizer)
            self.renderer.check()
        self.writers: list[PairWriter] = []
        self.summary = Summary(
            self.prefixes,
            str(self.dtype),
            self.tokenizer.choice.describe(),
            self.made_with.fingerprint,
            [],
            end_of_document=end_of_document(self.tokenizer, appended=job.append_eod),
            unknown=unknown_token(self.tokenizer),
            total_bytes=sum((part.end or size_of(part.path)) - part.begin for part in self.parts),
        )

    def refuse_to_replace(self, *, overwrite: bool, resume: bool) -> None:
        """Files of a finished run stay unless the user says otherwise."""
        if overwrite or (resume and self._journal().get("stage") == "publish"):
            return
        for prefix in self.prefixes:
            for path in (bin_path(prefix), idx_path(prefix)):
                if path.exists():
                    raise ConfigError(f"{path} is there already - give --overwrite to replace it")

    def is_finished(self) -> bool:
        """These very files are there already, made with these settings; fills the summary."""
        facts = []
        for prefix in self.prefixes:
            try:
                facts.append(json.loads(Path(f"{prefix}.meta.json").read_bytes()))
            except (OSError, ValueError):
                return False
            if not IndexedDataset.exists(prefix) or facts[-1].get("settings") != self._settings():
                return False
        summary = self.summary
        summary.resumed = True
        summary.keys = [KeyCounts.of(fact) for fact in facts]
        summary.hashes = [fact["sha256"] for fact in facts]
        summary.skipped = Counter(facts[0]["skipped"])
        summary.told = Counter(facts[0].get("chat", {}).get("counts", {}))
        summary.input_bytes = facts[0]["input_bytes"]
        summary.read_bytes = summary.read_before = summary.total_bytes
        _log.warning("note: --resume: the files of this run are complete; nothing to do")
        self.disk.remove_tree(self.folder)
        return True

    def _journal(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / JOURNAL).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextlib.contextmanager
    def workplace(self, resume: bool) -> Iterator[None]:
        """The folder of unfinished files: made or found, locked, removed at the end.

        It stays only where the run was interrupted after a mark.
        """
        self.disk.make_folder(self.folder)
        with ExitStack() as stack:
            self._lock(stack)
            try:
                self._open(resume)
                yield
                self.disk.remove_tree(self.folder)
            except (KeyboardInterrupt, WorkerDied, ResumeRefused):
                self._close()
                if not self._journal():
                    self.disk.remove_tree(self.folder)
                raise
            except BaseException:
                self._close()
                for writer, prefix in zip(self.writers, self.prefixes, strict=False):
                    with contextlib.suppress(StorageError):
                        writer.withdraw(prefix)
                with contextlib.suppress(StorageError):
                    self.disk.remove_tree(self.folder)
                raise

    def _lock(self, stack: ExitStack) -> None:
        """Two runs must not write the same files; the lock ends with the process."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is writing {self.prefixes[0]} at this moment - wait for it, or "
                "choose another --output-prefix"
            ) from error
        except OSError:  # a network file system without locks
            _log.info("%s cannot be locked; do not start two runs with one prefix", self.folder)

    def _open(self, resume: bool) -> None:
        journal = self._journal()
        if journal and resume:
            self._continue(journal)
            return
        if journal:
            _log.warning(
                "note: an interrupted run had written %d documents; starting anew, --resume would "
                "have kept them",
                journal["keys"][0]["documents"],
            )
        elif resume:
            _log.warning("note: --resume: no interrupted run is there; starting from the beginning")
        for path in self.folder.iterdir():
            self.disk.remove(path)
        for number, dtype in enumerate(self.dtypes):
            self.writers.append(PairWriter(self.folder, str(number), dtype, self.disk))
        self.summary.keys = [writer.counts for writer in self.writers]

    def _continue(self, journal: dict[str, Any]) -> None:
        settings, before = self._settings(), journal["settings"]
        different = [
            f"{name} was {before.get(name)}, is {settings.get(name)}"
            for name in dict.fromkeys([*settings, *before])
            if before.get(name) != settings.get(name)
        ]
        if different:
            raise ResumeRefused(
                "--resume needs the same settings and input: "
                + "; ".join(different)
                + " - run without --resume to start anew"
            )
        self.published = journal["stage"] == "publish"
        self.place = InputPlace(**journal["place"])
        counts = [KeyCounts(**key) for key in journal["keys"]]
        summary = self.summary
        summary.resumed = True
        summary.skipped.update(journal["skipped"])
        summary.told.update(journal.get("told", {}))
        self.ends.update(journal.get("ends", []))
        summary.input_bytes, summary.read_bytes = journal["input_bytes"], journal["read_bytes"]
        summary.read_before = summary.read_bytes
        summary.hashes = journal["hashes"]
        self.writers = [
            PairWriter(
                self.folder,
                str(n),
                dtype,
                self.disk,
                counts=key,
                complete=self.published,
            )
            for n, (key, dtype) in enumerate(zip(counts, self.dtypes, strict=True))
        ]
        summary.keys = [writer.counts for writer in self.writers]

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        job = self.job
        stats = [Path(path).stat() for path in self.inputs]
        # settings that are as they were before there was a choice are not named
        given: dict[str, Any] = {"--text-unit": job.text_unit} if job.text_unit else {}
        if job.longest != LONGEST_LINE:
            given["--max-line-mb"] = f"{job.longest / 2**20:g}"
        if job.chat is not None:
            given |= chat_settings(job.chat, self.renderer)
        return given | {
            "--input": [
                [path, stat.st_size, stat.st_mtime_ns]
                for path, stat in zip(self.inputs, stats, strict=True)
            ],
            "--shard": list(self.shard) if self.shard else None,
            "--json-keys": list(job.keys),
            "--template": job.template,
            "--append-eod": job.append_eod,
            "--on-bad-line": job.on_bad_line,
            "tokenizer": [job.data.tokenizer_type, self.summary.fingerprint],
            "end of document": self.made_with.eod if job.append_eod else None,
            "dtype": str(self.dtype),
        }

    def add(self, result: EncodedBatch) -> None:
        """Write a batch; the place moves behind it."""
        unknown = self.tokenizer.unknown
        for writer, tokens, dtype in zip(self.writers, result.tokens, self.dtypes, strict=True):
            writer.add(tokens)
            if unknown is not None and dtype == self.dtype:  # a mask holds no ids
                ends = tokens.num_eods if unknown == self.made_with.eod else 0
                writer.counts.unknown += int(np.count_nonzero(tokens.tokens == unknown)) - ends
        summary = self.summary
        summary.skipped += result.skipped
        summary.told += result.told
        self.ends |= result.ends
        summary.input_bytes += result.input_bytes
        summary.read_bytes += result.batch.read
        self.place = result.batch.next

    def mark(self, stage: str = "tokens") -> None:
        """From here a killed run resumes."""
        summary = self.summary
        journal = {
            "stage": stage,
            "settings": self._settings(),
            "place": asdict(self.place),
            "keys": [writer.mark() if stage == "tokens" else asdict(writer.counts)
                     for writer in self.writers],
            "skipped": summary.skipped,
            "told": summary.told,
            "ends": sorted(self.ends),
            "input_bytes": summary.input_bytes,
            "read_bytes": summary.read_bytes,
            "hashes": summary.hashes,
        }  # fmt: skip
        write_atomically(self.folder / JOURNAL, json.dumps(journal).encode(), self.disk)

    def complete(self) -> None:
        """All tokens are there: finish both files of every pair under their temporary names."""
        if self.shard is None:
            self._refuse_nothing()
        self.summary.tokenizer = self.tokenizer.choice.describe()
        self.summary.hashes = [writer.prepare() for writer in self.writers]
        self._write_facts()
        self.mark("publish")

    def publish(self) -> None:
        """Give the files their names."""
        # a mask comes first: where its samples stand it is there
        for writer, prefix in reversed(list(zip(self.writers, self.prefixes, strict=True))):
            writer.publish(prefix)
        for prefix, counts in zip(self.prefixes, self.summary.keys, strict=True):
            verify_written(prefix, counts)

    def _write_facts(self) -> None:
        """`{prefix}.meta.json`: the counts, the tokenizer and the hashes of both files."""
        summary = self.summary
        chat: dict[str, Any] = {}
        if self.job.chat is not None:
            mask = {"suffix": MASK_SUFFIX, "sha256": summary.hashes[1]}
            chat = {"chat": chat_facts(self.renderer, self.ends, summary.told), "loss_mask": mask}
        pairs = zip(self.writers, summary.hashes, self.dtypes, strict=True)
        for writer, hashes, dtype in pairs:
            facts = {
                **chat,
                "format": 1,
                **asdict(writer.counts),
                "skipped": dict(summary.skipped),
                "dtype": str(dtype),
                "append_eod": self.job.append_eod,
                "tokenizer": {
                    **tokenizer_facts(self.made_with),
                    "engine": summary.tokenizer,
                },
                "sha256": hashes,
                "settings": self._settings(),
                "input_bytes": summary.input_bytes,
                "read_bytes": summary.read_bytes,
                "seconds": round(summary.seconds, 3),
            }
            text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
            writer.write_facts(text.encode("utf-8"))

    def _refuse_nothing(self) -> None:
        names = ", ".join(self.inputs[:3]) + (", ..." if len(self.inputs) > 3 else "")
        skipped = f"; skipped: {dict(self.summary.skipped)}" if self.summary.skipped else ""
        if self.summary.documents == 0 and self.job.chat is not None:
            why = "the input has no conversation"
            if told := self.summary.told[WEIGHTLESS]:
                why = (
                    f"{told} conversations have no token to learn (no answer, only blank ones or of weight 0, "
                    "or none before --seq-length ends)"
                )
            raise DataError(f"{names}: no sample - {why}{skipped}")
        if self.summary.documents == 0:
            raise DataError(f"{names}: no documents - the input has no line with text{skipped}")
        for prefix, counts in zip(self.prefixes, self.summary.keys, strict=True):
            if counts.tokens == 0:
                raise DataError(
                    f"{names}: the {counts.documents} documents for {prefix} have no tokens"
                )

    def _close(self) -> None:
        for writer in self.writers:
            with contextlib.suppress(StorageError):
                writer.close()
