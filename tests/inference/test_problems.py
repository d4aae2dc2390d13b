"""Word problems: which number an answer is, what is asked, and that greedy generation answers it."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.problems import (
    WordProblems,
    continue_greedily,
    last_number,
    marked_answer,
    problem_prompt,
    read_problems,
)
from megatron_lite.inference.evaluating.scorer import Scorer
from megatron_lite.inference.model import load_model
from tests.support.extras import needs
from tests.support.huggingface import gpt2, tokenizer_files

GSM8K = [
    {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "A thousand and one?", "answer": "It is 1,001.\n#### 1,001"},
    {"question": "Three less four?", "answer": "3-4=-1\n#### -1"},
]


def write(path: Path, lines: list[object]) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("16-3-4=9, 9*2=$18\n#### 18", "18", "18"),
        ("#### 1,234", "1234", "1234"),
        ("#### -5", "-5", "-5"),
        ("####$70,000.50.", "70000.5", "70000.5"),
        ("so 5\n#### 7\nQuestion: 3\n#### 9", "7", "7"),
        ("the answer is 12.", None, "12"),
        ("it is -3 degrees", None, "-3"),
        ("10-3", None, "3"),
        ("costs $1,200.00", None, "1200"),
        ("#### none, or .5", None, "0.5"),
        ("nothing", None, None),
    ],
)
def test_the_answer_is_found(text: str, marked: str | None, last: str | None) -> None:
    assert marked_answer(text) == (None if marked is None else Decimal(marked))
    assert last_number(text) == (None if last is None else Decimal(last))


def test_problems_are_asked_behind_solved_ones(tmp_path: Path) -> None:
    one, two, three = read_problems(write(tmp_path / "a.jsonl", GSM8K), "--gsm8k")
    assert [one.answer, two.answer, three.answer] == [4, 1001, -1]
    assert problem_prompt([one, three], two) == (
        "Question: Two and two?\nAnswer: 2+2=<<2+2=4>>4\n#### 4\n\n"
        "Question: Three less four?\nAnswer: 3-4=-1\n#### -1\n\n"
        "Question: A thousand and one?\nAnswer:"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "--gsm8k .*x.jsonl:2 is no JSON"),
        ("[1]", 'x.jsonl:2 is not {"question": text'),
        ('{"question": "q", "answer": 4}', "x.jsonl:2 is not"),
        ('{"question": "q", "answer": "4"}', "x.jsonl:2: no number stands behind ####"),
        ('{"question": "a \\ud800", "answer": "#### 4"}', "x.jsonl:2 has half a surrogate pair"),
        (None, "x.jsonl holds no problem"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(tmp_path: Path, line, said: str) -> None:
    first = "" if line is None else json.dumps(GSM8K[0])
    (tmp_path / "x.jsonl").write_text(f"{first}\n{line or ''}")
    with pytest.raises(DataError, match=said):
        read_problems(str(tmp_path / "x.jsonl"), "--gsm8k")


@pytest.fixture
def examinee(tmp_path: Path) -> Examinee:
    needs("transformers")
    gpt2(n_positions=120).save_pretrained(tmp_path / "gpt2")
    tokenizer_files(tmp_path / "gpt2", "vocab.json", "merges.txt")
    loaded = load_model(tmp_path / "gpt2")
    return Examinee(Scorer(loaded.model, 2), loaded.tokenizer)


def test_generation_is_greedy_and_ends_at_a_stop(examinee: Examinee) -> None:
    import torch

    tokenizer, model = examinee.tokenizer, gpt2(n_positions=120)
    prompts = [tokenizer.encode(text) for text in ("the thin", "in", "then the inner tin")]
    expected = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=261
        )
        expected.append(tokenizer.decode([n for n in ids[0, len(prompt) :].tolist() if n != 261]))
    found = continue_greedily(examinee, prompts, max_new_tokens=[12] * 3, stops=[[]] * 3)
    assert found == expected
    stop = expected[0][3:5]
    cut = continue_greedily(
        examinee, prompts, max_new_tokens=[12] * 3, stops=[[stop, "no such"]] * 3
    )
    assert cut == [text.partition(stop)[0] for text in expected]
    few = continue_greedily(examinee, prompts, max_new_tokens=[12, 1, 5], stops=[[]] * 3)
    assert few[0] == expected[0] and len(tokenizer.encode(few[1])) <= 1


def test_a_model_that_answers_is_right(examinee: Examinee, tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl", GSM8K)
    exam = WordProblems(path, path, shots=1, max_new_tokens=20)
    assert exam.look(examinee.model.context.model, examinee.tokenizer) == []
    said = [" It is 4.\n#### 4.0", " so 1001", " 3-4=-1\n#### 1"]
    monkeypatch.setattr(
        "megatron_lite.inference.evaluating.problems.continue_greedily", lambda *_, **__: said
    )
    result = exam.run(examinee)
    assert result.values["exact_match"] == pytest.approx(1 / 3)
    assert result.values["last_number"] == pytest.approx(2 / 3)
    assert result.values["solutions"] == said
    assert result.rows[1][1:] == ["3", "0.3333", "0.6667"]


def test_what_has_no_room_loses_whole_examples(examinee: Examinee, tmp_path: Path) -> None:
    path, model = write(tmp_path / "a.jsonl", GSM8K), examinee.model.context.model
    exam = WordProblems(path, path, shots=3, max_new_tokens=5)
    (said,) = exam.look(model, examinee.tokenizer)
    assert "a.jsonl: 3 of 3 prompts have less than they should, for 115 positions" in said
    problems = read_problems(path, "--gsm8k")
    for problem, prompt in zip(problems, exam._prompts, strict=True):
        assert prompt in [
            examinee.tokenizer.encode(problem_prompt(problems[:k], problem)) for k in range(3)
        ]
    assert exam.run(examinee).values["problems"] == 3
    with pytest.raises(DataError, match="has 3 problems, --shots wants 4"):
        WordProblems(path, path, shots=4).look(model, examinee.tokenizer)
    with pytest.raises(ConfigError, match="--max-new-tokens 120 leaves no room .* 120 positions"):
        WordProblems(path, max_new_tokens=120).look(model, examinee.tokenizer)
