"""Multiple choice: which letter a model finds likeliest behind a question, after some examples with answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.beginning import text_ids
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.question_files import (
    LETTERS,
    Question,
    QuestionLayout,
    Subject,
    read_subjects,
)
from megatron_lite.inference.evaluating.results import Result
from megatron_lite.inference.evaluating.scorer import ScoredRow, Scorer


@dataclass(frozen=True, slots=True)
class LetterRows:
    """The rows of a question, one for all letters or one each; shots: examples that found room.

    cut: not even the question alone did, and its beginning is missing.
    """

    rows: Sequence[ScoredRow]
    shots: int
    cut: bool


def letter_rows(
    layout: QuestionLayout,
    subject: Subject,
    question: Question,
    tokenizer: Tokenizer,
    *,
    shots: int,
    positions: int,
) -> LetterRows:
    """Letters are encoded behind their prompt, and compared from where their tokens part.

    Where all is longer than the positions, whole examples are left out, the last ones first.
    """
    while True:
        prompt = layout.prompt(subject, question, shots)
        ids = [text_ids(tokenizer, prompt + layout.letter(letter)) for letter in LETTERS]
        cut = max(map(len, ids)) - 1 > positions
        if not (cut and shots):
            break
        shots -= 1
    same = _common(ids)
    if all(len(one) == same + 1 for one in ids):
        begin = max(0, same - positions)
        context = np.array(ids[0][begin:same], np.int64)
        last = np.full(len(ids), len(context) - 1)
        row = ScoredRow(context, last, np.array([one[same] for one in ids], np.int64))
        return LetterRows([row], shots, cut)
    rows = []
    for one in ids:
        begin = min(max(0, len(one) - 1 - positions), same - 1)
        tokens = np.array(one[begin:], np.int64)
        at = np.arange(same - begin, len(tokens))
        rows.append(ScoredRow(tokens[:-1], at - 1, tokens[at]))
    return LetterRows(rows, shots, cut)


def _common(ids: Sequence[Sequence[int]]) -> int:
    """Tokens that all begin with, and behind which each has one."""
    shortest = min(map(len, ids)) - 1
    same = 0
    while same < shortest and len({one[same] for one in ids}) == 1:
        same += 1
    return same


def chosen_letters(
    scorer: Scorer, asked: Sequence[LetterRows], told: Any = lambda done: None
) -> str:
    """The likeliest letter of each question, the first of equal ones; the same on every rank."""
    rows = [row for one in asked for row in one.rows]
    scores = iter(scorer.all(rows, told))
    letters = []
    for one in asked:
        found = [next(scores).log_probabilities for _ in one.rows]
        chances = found[0] if len(found) == 1 else [part.sum() for part in found]
        letters.append(LETTERS[int(np.argmax(chances))])
    return "".join(letters)


@dataclass(slots=True)
class MultipleChoice:
    """The exam of one folder in a benchmark's layout; split: the benchmark's own by default."""

    layout: QuestionLayout
    folder: str
    split: str | None = None
    shots: int = 5
    limit: int | None = None
    _subjects: list[Subject] = field(init=False)
    _asked: list[LetterRows] = field(init=False)

    def look(self, model: ModelConfig, tokenizer: Tokenizer) -> Sequence[str]:
        """All files are read, and all prompts made."""
        self._subjects = read_subjects(
            self.folder, self.layout, split=self.split or self.layout.split, shots=self.shots,
            limit=self.limit,
        )  # fmt: skip
        self._asked = [
            letter_rows(
                self.layout, subject, question, tokenizer, shots=self.shots,
                positions=model.num_positions,
            )
            for subject in self._subjects
            for question in subject.questions
        ]  # fmt: skip
        shortened = sum(one.shots < self.shots for one in self._asked)
        cut = sum(one.cut for one in self._asked)
        said = []
        if shortened:
            said.append(f"{self.folder}: {shortened} of {len(self._asked)} prompts have less than "
                        f"{self.shots} examples, for the model's {model.num_positions} positions")  # fmt: skip
        if cut:
            said.append(f"{self.folder}: {cut} questions have lost their beginning, likewise")
        return said

    def run(self, examinee: Examinee) -> Result:
        """Collective over the model's ranks."""
        total = sum(len(one.rows) for one in self._asked)
        with examinee.progress(self.layout.name, total, "rows") as told:
            letters = chosen_letters(examinee.scorer, self._asked, told)
        found, begin = [], 0
        for subject in self._subjects:
            end = begin + len(subject.questions)
            found.append(SubjectScore(subject, letters[begin:end]))
            begin = end
        values = {
            "split": self.split or self.layout.split,
            "shots": self.shots,
            "questions": len(letters),
            "shortened": sum(one.shots < self.shots for one in self._asked),
            "cut": sum(one.cut for one in self._asked),
            **averages(found),
        }
        return Result(
            self.layout.name, self.folder, _rows(self.layout, values), values, _notes(values)
        )


@dataclass(frozen=True, slots=True)
class SubjectScore:
    """letters: one for each question."""

    subject: Subject
    letters: str

    @property
    def right(self) -> int:
        """Questions with the right letter."""
        answers = (question.answer for question in self.subject.questions)
        return sum(a == b for a, b in zip(answers, self.letters, strict=True))

    @property
    def accuracy(self) -> float:
        """Share of them."""
        return self.right / len(self.letters)


def averages(found: Sequence[SubjectScore]) -> dict[str, Any]:
    """Of each subject, each group (the mean over its subjects), all subjects, and all questions."""
    groups: dict[str, list[float]] = {}
    for one in found:
        groups.setdefault(one.subject.group, []).append(one.accuracy)
    return {
        "average": sum(one.accuracy for one in found) / len(found),
        "accuracy": sum(one.right for one in found) / sum(len(one.letters) for one in found),
        "groups": {name: sum(part) / len(part) for name, part in groups.items()},
        "subjects": {
            one.subject.name: {
                "group": one.subject.group, "questions": len(one.letters), "right": one.right,
                "accuracy": one.accuracy, "letters": one.letters,
            }
            for one in found
        },
    }  # fmt: skip


def _rows(layout: QuestionLayout, values: dict[str, Any]) -> list[list[str]]:
    rows = [[f"{layout.name}, {values['split']}, {values['shots']} shots", "questions", "accuracy"]]
    for group, mean in values["groups"].items():
        inside = {n: s for n, s in values["subjects"].items() if s["group"] == group}
        rows += [[f"  {n}", str(s["questions"]), f"{s['accuracy']:.4f}"] for n, s in inside.items()]
        rows.append([f"{group} (mean of {len(inside)})",
                     str(sum(s["questions"] for s in inside.values())), f"{mean:.4f}"])  # fmt: skip
    count = len(values["subjects"])
    rows.append([f"average of {count} subject{'s' if count > 1 else ''}", str(values["questions"]),
                 f"{values['average']:.4f}"])  # fmt: skip
    return rows


def _notes(values: dict[str, Any]) -> list[str]:
    return [f"of all questions: {values['accuracy']:.4f}; a guess is right in 0.25"]
