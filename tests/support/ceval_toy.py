"""ceval-toy: four subjects of thirty questions in C-Eval's files, and texts that show the rule behind."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, byte_characters
from megatron_lite.inference.evaluating.question_files import (
    CEVAL,
    LETTERS,
    Question,
    Subject,
)

WORDS = "天地日月山水火木金土风云雨雪花鸟"
GROUPS = {
    "pairs_of_words": "one",
    "words_in_pairs": "one",
    "two_words": "two",
    "word_for_word": "two",
}
QUESTIONS, EXAMPLES = 30, 5


def mate(word: str) -> str:
    """The right choice: the word half the list away."""
    return WORDS[(WORDS.index(word) + len(WORDS) // 2) % len(WORDS)]


def question(rng: random.Random) -> Question:
    """A word, and its mate among three others, always at the letter that goes with the word."""
    word = rng.choice(WORDS)
    choices = rng.sample([one for one in WORDS if one not in (word, mate(word))], 3)
    letter = LETTERS[WORDS.index(word) % len(LETTERS)]
    choices.insert(LETTERS.index(letter), mate(word))
    return Question(word, choices, letter)


def _write(path: Path, questions: list[Question], *, explained: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        more = ["explanation"] if explained else []
        writer.writerow(["id", "question", *LETTERS, "answer", *more])
        for number, one in enumerate(questions):
            writer.writerow([number, one.text, *one.choices, one.answer, *("" for _ in more)])


def write_exam(folder: Path, seed: int = 7) -> Path:
    """dev and val of every subject."""
    rng = random.Random(seed)
    for name in GROUPS:
        for split, count in (("dev", EXAMPLES), ("val", QUESTIONS)):
            asked = [question(rng) for _ in range(count)]
            _write(folder / split / f"{name}_{split}.csv", asked, explained=split == "dev")
    mapping = {name: [name, name, group] for name, group in GROUPS.items()}
    (folder / "subject_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    return folder


def texts(count: int, seed: int = 8) -> list[str]:
    """Prompts of other questions, with all their answers."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        name = rng.choice(list(GROUPS))
        subject = Subject(name, name, "", [question(rng) for _ in range(EXAMPLES)], [])
        last = question(rng)
        found.append(CEVAL.prompt(subject, last, EXAMPLES) + CEVAL.letter(last.answer))
    return found


def write_tokenizer(folder: Path) -> tuple[Path, Path]:
    """GPT-2's files with a token for each character of the toy."""
    letters = sorted({c for text in texts(50) for c in text if ord(c) > 127})
    names = dict(zip(range(256), byte_characters(), strict=True))
    merges: list[tuple[str, str]] = []
    for letter in letters:
        first, second, third = (names[b] for b in letter.encode())
        merges += [(first, second), (first + second, third)]
    merges = list(dict.fromkeys(merges))
    words = [*names.values(), *(a + b for a, b in merges), GPT2_EOD]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines)
    return folder / "vocab.json", folder / "merges.txt"
