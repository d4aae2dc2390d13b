"""Batches of conversations become samples and what of them is learned; what is not kept is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.config.errors import DataError
from megatron_lite.data.chat.conversation import Renderer
from megatron_lite.data.chat.formats import CHAT_FORMATS
from megatron_lite.data.chat.lessons import Dialogue, Lesson, lessons_of
from megatron_lite.data.indexed import token_dtype
from megatron_lite.data.masks import MASK_DTYPE
from megatron_lite.data.preparing.dialogues import AUTO_SHAPE, AskedBy, Dialogues
from megatron_lite.data.preparing.pair_writer import TokenBatch
from megatron_lite.data.preparing.parts import RecordBatch
from megatron_lite.data.preparing.records import BadRecord, Reader, require_object

KEPT, PARTED, CUT, WEIGHTLESS = "kept", "parted", "truncated", "weightless"
LEARNED = "learned tokens"


@dataclass(frozen=True, slots=True)
class ChatJob:
    """How conversations are read and written.

    template: a name of CHAT_FORMATS or a file; None: the one beside the tokenizer.
    seq_length: of the training; None: nothing is cut.
    """

    template: str | None = None
    shape: str = AUTO_SHAPE
    recipe: AskedBy | None = None
    seq_length: int | None = None

    def anywhere(self) -> ChatJob:
        """The same for a process that was started in another folder."""
        if self.template is None or self.template in CHAT_FORMATS:
            return self
        return replace(self, template=str(Path(self.template).absolute()))

    def dialogues(self) -> Dialogues:
        """What reads its records."""
        return Dialogues(self.shape, self.recipe)


@dataclass(slots=True)
class Learned:
    """Samples and masks of a batch, and how many there are of what; ends: ids that end an answer."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    ends: set[int] = field(default_factory=set)

    def tokens(self, vocab_size: int, eod: int) -> list[TokenBatch]:
        """Of both pairs."""
        each = np.ones(len(self.lengths), np.int64)
        ids = np.array(self.ids, token_dtype(vocab_size))
        lengths = np.array(self.lengths, np.int32)
        return [
            TokenBatch(ids, lengths, each, int(np.count_nonzero(ids == eod))),
            TokenBatch(np.array(self.mask, MASK_DTYPE), lengths, each, 0),
        ]


class ChatEncoder:
    """Turns batches of records into samples."""

    def __init__(self, job: ChatJob, renderer: Renderer, reader: Reader) -> None:
        self._job, self._renderer, self._reader = job, renderer, reader
        self._dialogues = job.dialogues()

    def run(self, batch: RecordBatch) -> Learned:
        """DataError names file and line of the first bad record, unless they are skipped."""
        learned = Learned()

        def take(record: Any, sure: bool) -> None:
            require_object(record)
            self._add(learned, self._dialogues(record))

        self._reader.walk(batch, take, learned.skipped)
        return learned

    def _add(self, learned: Learned, dialogue: Dialogue) -> None:
        if not dialogue.learned:
            learned.told[WEIGHTLESS] += 1
            return
        try:
            lessons = lessons_of(self._renderer, dialogue)
        except DataError as error:
            raise BadRecord("no conversation", str(error)) from error
        learned.told[PARTED] += len(lessons) > 1
        for lesson in lessons:
            self._keep(learned, lesson)

    def _keep(self, learned: Learned, lesson: Lesson) -> None:
        """As many tokens as the training takes, where one of them is learned."""
        longest = len(lesson.ids) if self._job.seq_length is None else self._job.seq_length + 1
        ids, mask = lesson.ids[:longest], _predicted(lesson.mask[:longest])
        learned.told[CUT] += len(lesson.ids) > longest
        if not any(mask):
            learned.told[WEIGHTLESS] += 1
            return
        learned.told[KEPT] += 1
        learned.told[LEARNED] += sum(mask)
        learned.ids += ids
        learned.mask += mask
        learned.lengths.append(len(ids))
        learned.ends |= lesson.ends


def _predicted(mask: Sequence[int]) -> list[int]:
    """The first token of a sample is predicted from nothing."""
    return [0, *mask[1:]]
