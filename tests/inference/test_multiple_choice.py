"""Multiple choice in C-Eval's and MMLU's files: what is asked, which letter wins, what an average is of."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_lite.cli import evaluate
from megatron_lite.config.errors import DataError
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megatron_lite.inference.evaluating.multiple_choice import (
    SubjectScore,
    averages,
    chosen_letters,
    letter_rows,
)
from megatron_lite.inference.evaluating.question_files import (
    CEVAL,
    MMLU,
    Question,
    Subject,
    read_questions,
    read_subjects,
)
from megatron_lite.inference.evaluating.results import side_by_side
from megatron_lite.inference.evaluating.scorer import Scorer
from megatron_lite.inference.evaluating.subjects import CEVAL_SUBJECTS, MMLU_SUBJECTS
from megatron_lite.inference.model import load_model
from tests.support.ceval_toy import GROUPS, write_exam, write_tokenizer
from tests.support.extras import needs
from tests.support.huggingface import gpt2, our_logits, tokenizer_files, tool

ONE = Question("Which letter is first?", ["a", "b", "c", "d"], "A")
TWO = Question("Which is last?", ["a", "b", "c", "d"], "D")


def model_folder(path: Path, positions: int = 400) -> Path:
    needs("transformers")
    gpt2(n_positions=positions).save_pretrained(path)
    tokenizer_files(path, "vocab.json", "merges.txt")
    return path


def test_a_prompt_is_the_benchmarks_own_with_examples_in_file_order() -> None:
    subject = Subject("logic", "逻辑学", "Humanities", [ONE, TWO], [ONE])
    choices = "A. a\nB. b\nC. c\nD. d\n"
    assert CEVAL.prompt(subject, TWO, 1) == (
        "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n"
        f"Which letter is first?\n{choices}答案：A\n\nWhich is last?\n{choices}答案："
    )
    subject = Subject("us_foreign_policy", "us foreign policy", "", [ONE, TWO], [ONE])
    assert MMLU.prompt(subject, ONE, 2) == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        f"Which letter is first?\n{choices}Answer: A\n\nWhich is last?\n{choices}Answer: D\n\n"
        f"Which letter is first?\n{choices}Answer:"
    )


def test_every_subject_has_its_group() -> None:
    for subjects, sizes in (
        (CEVAL_SUBJECTS, {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11}),
        (MMLU_SUBJECTS, {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}),
    ):
        assert Counter(title.group for title in subjects.values()) == sizes
        assert len({title.title for title in subjects.values()}) == sum(sizes.values())


def test_an_average_is_over_subjects_and_groups_not_over_questions() -> None:
    found = [
        SubjectScore(Subject(name, name, group, [], [TWO] * len(letters)), letters)
        for name, group, letters in (("x", "g", "DDDD"), ("y", "g", "AD"), ("z", "h", "ABCABCABCD"))
    ]
    values = averages(found)
    assert values["groups"] == {"g": pytest.approx(0.75), "h": pytest.approx(0.1)}
    assert values["average"] == pytest.approx((1 + 0.5 + 0.1) / 3)
    assert values["accuracy"] == pytest.approx(6 / 16)
    assert values["subjects"]["y"] == {
        "group": "g", "questions": 2, "right": 1, "accuracy": 0.5, "letters": "AD"}  # fmt: skip


def test_letters_are_compared_behind_their_prompt(tmp_path: Path) -> None:
    """By hand: the logits behind the prompt at the four letters, as they are encoded there."""
    path = model_folder(tmp_path / "gpt2")
    loaded = load_model(path)
    subject = Subject("logic", "logic", "", [TWO, ONE], [ONE])
    for layout in (CEVAL, MMLU):
        asked = letter_rows(layout, subject, ONE, loaded.tokenizer, shots=1, positions=400)
        (row,) = asked.rows if len(asked.rows) == 1 else [None]
        prompt = layout.prompt(subject, ONE, 1)
        ids = [loaded.tokenizer.encode(prompt + layout.letter(one)) for one in "ABCD"]
        if row is not None:  # every letter is one token
            assert [*row.tokens] == ids[0][:-1] and [*row.targets] == [one[-1] for one in ids]
        chances = []
        for one in ids:
            logits = our_logits(path, torch.tensor([one]))[0].double().log_softmax(-1)
            behind = len(loaded.tokenizer.encode(prompt)) - 2
            chances.append(sum(float(logits[n, one[n + 1]]) for n in range(behind, len(one) - 1)))
        best = "ABCD"[chances.index(max(chances))]
        assert chosen_letters(Scorer(loaded.model, 3), [asked] * 2) == best * 2


class Merging:
    """A tokenizer in which two of the letters join what stands before them."""

    begins = ()

    def encode(self, text: str) -> list[int]:
        ids = [5, 6, 7]
        return {"A": [*ids, 8], "B": [*ids[:2], 9], "C": [*ids, 3, 4], "D": [*ids[:2], 2, 1]}[
            text[-1]
        ]


def test_letters_of_several_tokens_are_compared_from_where_they_part() -> None:
    subject = Subject("logic", "logic", "", [], [ONE])
    for positions in (50, 2):
        asked = letter_rows(CEVAL, subject, ONE, Merging(), shots=0, positions=positions)  # type: ignore[arg-type]
        assert [row.targets.tolist() for row in asked.rows] == [[7, 8], [9], [7, 3, 4], [2, 1]]
    whole = letter_rows(CEVAL, subject, ONE, Merging(), shots=0, positions=50)  # type: ignore[arg-type]
    assert [row.tokens.tolist() for row in whole.rows] == [
        [5, 6, 7],
        [5, 6],
        [5, 6, 7, 3],
        [5, 6, 2],
    ]
    assert [row.positions.tolist() for row in whole.rows] == [[1, 2], [1], [1, 2, 3], [1, 2]]


def test_what_has_no_room_loses_whole_examples_last_ones_first(tmp_path: Path) -> None:
    vocab, merges = write_tokenizer(tmp_path)
    tokenizer = GPT2BPETokenizer(str(vocab), str(merges))
    (subject, *_) = read_subjects(str(write_exam(tmp_path / "exam")), CEVAL, split="val", shots=5)
    asked = subject.questions[0]
    sizes = [len(tokenizer.encode(CEVAL.prompt(subject, asked, k))) for k in range(6)]
    for shots, size in enumerate(sizes):
        for room in {size, sizes[shots + 1] - 1 if shots < 5 else size + 100}:
            found = letter_rows(CEVAL, subject, asked, tokenizer, shots=5, positions=room)
            assert (found.shots, found.cut) == (shots, False)
            expected = tokenizer.encode(CEVAL.prompt(subject, asked, shots))
            assert found.rows[0].tokens.tolist() == expected
    short = letter_rows(CEVAL, subject, asked, tokenizer, shots=5, positions=9)
    assert (short.shots, short.cut) == (0, True)
    assert short.rows[0].tokens.tolist() == tokenizer.encode(CEVAL.prompt(subject, asked, 0))[-9:]


def test_the_real_files_columns_are_read(tmp_path: Path) -> None:
    (subject, *others) = read_subjects(
        str(write_exam(tmp_path)), CEVAL, split="val", shots=5, limit=4
    )
    assert [one.name for one in (subject, *others)] == sorted(GROUPS)
    assert (len(subject.examples), len(subject.questions)) == (5, 4)
    for split, rows in (
        ("dev", [["q, with comma", 1, 2, 3, 4, "B"]] * 5),
        ("test", [["q", "a", "b", "c", "d", "d "]]),
    ):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        with (tmp_path / "mmlu" / split / f"virology_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    (subject,) = read_subjects(str(tmp_path / "mmlu"), MMLU, split="test", shots=5)
    assert (subject.title, subject.group) == ("virology", "other")
    assert subject.questions == [Question("q", ["a", "b", "c", "d"], "D")]
    assert subject.examples[0] == Question("q, with comma", ["1", "2", "3", "4"], "B")


HEAD = "id,question,A,B,C,D,answer\n"


@pytest.mark.parametrize(
    ("layout", "content", "said"),
    [
        (CEVAL, "", "x.csv:1 names the columns none, and question, A, B, C, D, answer is missing"),
        (CEVAL, "id,question,A,B,C,D\n0,q,a,b,c,d\n", "answer is missing.*are not public: take val"),
        (CEVAL, HEAD + "0,q,a,b,c,d,A\n1,q,a,b,c,d\n", "x.csv:3 has 6 columns, C-Eval's have 7"),
        (CEVAL, HEAD + '0,"two\nlines",a,b,c,d,A\n1,q,a,b,c,d,E\n', "x.csv:4: the answer is 'E'"),
        (CEVAL, HEAD + '0,"q,a,b,c,d,A\n', "x.csv:2 is no record of a CSV file"),
        (MMLU, "q,a,b,c,d,A\n\nq,a,b,c,A\n", "x.csv:3 has 5 columns, MMLU's have 6"),
        (MMLU, HEAD, "x.csv:1 has 7 columns, MMLU's have 6"),
    ],
)  # fmt: skip
def test_a_file_of_another_layout_is_refused_with_its_line(
    tmp_path: Path, layout, content: str, said: str
) -> None:
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        read_questions(tmp_path / "x.csv", layout)


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="holds no test/<subject>_test.csv: it must have the layout"
    ):
        read_subjects(str(write_exam(tmp_path)), MMLU, split="test", shots=5)
    with pytest.raises(DataError, match="pairs_of_words_dev.csv has 5 examples, --shots wants 6"):
        read_subjects(str(tmp_path), CEVAL, split="val", shots=6)
    (tmp_path / "dev" / "pairs_of_words_dev.csv").unlink()
    with pytest.raises(DataError, match="pairs_of_words_dev.csv is not there, and --shots 5"):
        read_subjects(str(tmp_path), CEVAL, split="val", shots=5)
    assert len(read_subjects(str(tmp_path), CEVAL, split="val", shots=0)) == 4
    for wrong in ('{"logic": "Logic"}', '{"logic": ["a", "\\ud800", "b"]}', "["):
        (tmp_path / "subject_mapping.json").write_text(wrong)
        with pytest.raises(DataError, match="subject_mapping.json is not"):
            read_subjects(str(tmp_path), CEVAL, split="val", shots=0)


def test_files_as_spreadsheets_write_them_are_read(tmp_path: Path) -> None:
    """A mark of UTF-8, CRLF, quoted commas, quotes and lines, small letters."""
    text = '\ufeff"q, ""x""\nz",a,b,c,d,b\r\n\r\nq,1,2,3,4, C \r\n'
    (tmp_path / "x.csv").write_bytes(text.encode())
    one, two = read_questions(tmp_path / "x.csv", MMLU)
    assert one == Question('q, "x"\nz', ["a", "b", "c", "d"], "B")
    assert two == Question("q", ["1", "2", "3", "4"], "C")


def test_a_name_cannot_move_the_cursor() -> None:
    assert side_by_side([["a\x1b[2Jb\n", "1"], ["是", "2"]]) == "a\\x1b[2Jb\\n  1\n是           2"


def test_no_batch_changes_a_letter(tmp_path: Path, monkeypatch, capsys) -> None:
    path, exam = model_folder(tmp_path / "gpt2"), write_exam(tmp_path / "exam")
    found = []
    for batch_size in (1, 7):
        words = [
            "--load",
            path,
            "--ceval",
            exam,
            "--batch-size",
            batch_size,
            "--limit",
            4,
            "--shots",
            1,
        ]
        assert tool(evaluate.main, monkeypatch, *words, "--use-cpu") == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert "C-Eval, val, 1 shots" in found[0] and "average of 4 subjects" in found[0]
    lines = {
        line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:]
        for line in found[0].splitlines()
        if line
    }
    assert lines["one (mean of 2)"][0] == "8" and lines["pairs_of_words"][0] == "4"
