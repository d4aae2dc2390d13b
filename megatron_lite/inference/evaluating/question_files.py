"""Multiple choice in the file layouts of C-Eval and MMLU.

FOLDER/dev/<subject>_dev.csv      examples, shown in file order
FOLDER/val/<subject>_val.csv      what is asked; or test/<subject>_test.csv
FOLDER/subject_mapping.json       C-Eval's, if there: {"<subject>": [English, title, group]}
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.errors import DataError
from megatron_lite.inference.evaluating.corpora import read_text
from megatron_lite.inference.evaluating.subjects import (
    CEVAL_SUBJECTS,
    MMLU_SUBJECTS,
    OWN,
    SubjectTitle,
)

LETTERS = "ABCD"
NAMED_COLUMNS = ("question", *LETTERS, "answer")


@dataclass(frozen=True, slots=True)
class Question:
    """With its four choices and the letter of the right one."""

    text: str
    choices: Sequence[str]
    answer: str


@dataclass(frozen=True, slots=True)
class Subject:
    """examples: those of dev, in file order."""

    name: str
    title: str
    group: str
    examples: Sequence[Question]
    questions: Sequence[Question]


@dataclass(frozen=True, slots=True)
class QuestionLayout:
    """How a benchmark writes its files and asks its questions.

    named: the first line of a file names the columns; else there are six in order.  intro: the first
    line of a prompt; answer: the word behind the choices; before_letter: between it and the letter.
    """

    name: str
    flag: str
    named: bool
    intro: str
    answer: str
    before_letter: str
    subjects: Mapping[str, SubjectTitle]
    split: str

    def asked(self, question: Question) -> str:
        """A question up to where its letter belongs."""
        choices = [f"{at}. {text}\n" for at, text in zip(LETTERS, question.choices, strict=True)]
        return f"{question.text}\n{''.join(choices)}{self.answer}"

    def letter(self, letter: str) -> str:
        """An answer, as it stands behind asked()."""
        return self.before_letter + letter

    def prompt(self, subject: Subject, question: Question, shots: int) -> str:
        """The intro, the first examples with their answers, the question without."""
        shown = [
            f"{self.asked(one)}{self.letter(one.answer)}\n\n" for one in subject.examples[:shots]
        ]
        return self.intro.format(subject=subject.title) + "".join(shown) + self.asked(question)


CEVAL = QuestionLayout(
    "C-Eval", "--ceval", named=True,
    intro="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
    answer="答案：", before_letter="", subjects=CEVAL_SUBJECTS, split="val",
)  # fmt: skip
"""arXiv:2305.08322, its prompt for answers only."""

MMLU = QuestionLayout(
    "MMLU", "--mmlu", named=False,
    intro="The following are multiple choice questions (with answers) about {subject}.\n\n",
    answer="Answer:", before_letter=" ", subjects=MMLU_SUBJECTS, split="test",
)  # fmt: skip
"""arXiv:2009.03300."""


def read_subjects(
    folder: str, layout: QuestionLayout, *, split: str, shots: int, limit: int | None = None
) -> list[Subject]:
    """All subjects of a folder by name; limit: at most so many questions of each.

    DataError names file and line of what has another layout.
    """
    root, tail = Path(folder), f"_{split}.csv"
    titles = {**layout.subjects, **_mapping(root / "subject_mapping.json", layout)}
    files = sorted((root / split).glob(f"*{tail}")) if (root / split).is_dir() else []
    if not files:
        raise DataError(
            f"{layout.flag} {folder} holds no {split}/<subject>{tail}: it must have the layout of "
            f"{layout.name}, dev/<subject>_dev.csv and {split}/<subject>{tail}"
        )
    found = []
    for file in files:
        name = file.name.removesuffix(tail)
        examples: list[Question] = []
        if shots:
            dev = root / "dev" / f"{name}_dev.csv"
            if not dev.exists():
                raise DataError(
                    f"{layout.flag} {folder}: {dev} is not there, and --shots {shots} takes its examples from "
                    "it: copy it, or give --shots 0"
                )
            examples = read_questions(dev, layout)
            if len(examples) < shots:
                raise DataError(
                    f"{dev} has {len(examples)} examples, --shots wants {shots}: give less"
                )
        known = titles.get(name, SubjectTitle(name.replace("_", " "), OWN))
        questions = read_questions(file, layout)
        if not questions:
            raise DataError(f"{file} holds no question - remove it, or copy it again")
        found.append(Subject(name, known.title, known.group, examples[:shots], questions[:limit]))
    return found


def read_questions(path: Path, layout: QuestionLayout) -> list[Question]:
    """The questions of a file, in order."""
    rows = _rows(path, layout)
    order: Sequence[int] = range(len(NAMED_COLUMNS))
    width = len(NAMED_COLUMNS)
    if layout.named:
        line, names = next(rows, (1, []))
        missing = [name for name in NAMED_COLUMNS if name not in names]
        if missing:
            hidden = " (the answers of C-Eval's test are not public: take val)" * (
                missing == ["answer"]
            )
            raise DataError(
                f"{path}:{line} names the columns {', '.join(names) or 'none'}, and {', '.join(missing)} "
                f"is missing; {layout.name}'s are {', '.join(NAMED_COLUMNS)}{hidden}"
            )
        order, width = [names.index(name) for name in NAMED_COLUMNS], len(names)
    found = []
    for line, cells in rows:
        if len(cells) != width:
            raise DataError(f"{path}:{line} has {len(cells)} columns, {layout.name}'s have {width}")
        text, *choices, answer = (cells[at] for at in order)
        letter = answer.strip().upper()
        if letter not in tuple(LETTERS):
            raise DataError(f"{path}:{line}: the answer is {answer[:40]!r}, no letter from A to D")
        found.append(Question(text.strip(), [choice.strip() for choice in choices], letter))
    return found


def _rows(path: Path, layout: QuestionLayout) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of each record; empty lines are none."""
    reader = csv.reader(io.StringIO(read_text(str(path), layout.flag), newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line} is no record of a CSV file ({error})") from None


def _mapping(path: Path, layout: QuestionLayout) -> dict[str, SubjectTitle]:
    """Titles and groups that a folder brings along."""
    if not path.exists():
        return {}
    try:
        found = json.loads(read_text(str(path), layout.flag))
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no character
        return {
            str(name): SubjectTitle(str(title), str(group))
            for name, (_, title, group) in found.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f'{path} is not {{"<subject>": [English name, title, group]}}: mend or remove it'
        ) from None
