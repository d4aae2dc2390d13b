"""Texts begin for a model as they did where it was trained: in tools, conversions, runs and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.cli import convert, evaluate, generate
from megatron_lite.data.chat.conversation import renderer_of
from megatron_lite.data.chat.formats import Message
from megatron_lite.data.tokenizers.beginning import text_ids
from megatron_lite.inference.evaluating.corpora import first_token
from megatron_lite.inference.evaluating.multiple_choice import letter_rows
from megatron_lite.inference.evaluating.question_files import CEVAL, Question, Subject
from megatron_lite.inference.model import load_model
from megatron_lite.inference.serving.asked import Served, completion
from tests.support.begun import BEGIN, write_llama
from tests.support.extras import needs
from tests.support.huggingface import tool
from tests.train.runs import alone

PROMPTS = ["the thin inner hint", "other", "in"]
LLAMA = [
    "--mock-data", "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear",
    "--position-embedding-type", "rope", "--untie-embeddings-and-output-weights",
    "--max-position-embeddings", "64", "--train-iters", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizer begins texts with <s>."""
    needs("tokenizers"), needs("transformers")
    folder = tmp_path_factory.mktemp("begun") / "theirs"
    write_llama(folder)
    return folder


@pytest.fixture(scope="module")
def converted(theirs: Path) -> Path:
    """The run that tools/convert.py makes of it."""
    out = theirs.with_name("converted")
    with pytest.MonkeyPatch.context() as patch:
        assert tool(convert.main, patch, theirs, out) == 0
    return out


@pytest.fixture(scope="module")
def scratch(theirs: Path) -> Path:
    """A run with the same tokenizer that began with random weights."""
    out = theirs.with_name("scratch")
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(theirs)]
    done = alone(*LLAMA, *words, "--lr", "0.05", "--save", str(out), without=["--vocab-size"])
    assert done.rc == 0, done.err
    return out


def said_by_theirs(folder: Path) -> list[str]:
    """What transformers continues each prompt with, encoded as its tokenizer does."""
    transformers = needs("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        whole = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=8,
            do_sample=False, eos_token_id=261, pad_token_id=261,
        )[0, given["input_ids"].shape[1] :]  # fmt: skip
        found.append(tokenizer.decode([n for n in whole.tolist() if n != 261]))
    return found


def said(monkeypatch: Any, capsys: Any, folder: Path, *more: object) -> list[str]:
    capsys.readouterr()
    words = ["--load", folder, "--prompt", *PROMPTS, "--temperature", "0", "--max-new-tokens", "8"]
    code = tool(
        generate.main, monkeypatch, *words, "--jsonl", "--use-cpu", "--dtype", "float32", *more
    )
    assert code == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def begins(run: Path) -> object:
    return read_manifest(max(run.glob("iter_*"))).tokenizer.get("begins")


def test_a_folder_its_run_and_an_export_of_it_say_what_transformers_says(
    theirs: Path, converted: Path, monkeypatch, capsys
) -> None:
    expected, out = said_by_theirs(theirs), theirs.with_name("export")
    assert tool(convert.main, monkeypatch, converted, out) == 0
    assert begins(converted) == [BEGIN]
    assert said_by_theirs(out) == expected
    for folder in (theirs, converted, out):
        assert said(monkeypatch, capsys, folder) == expected
    assert said(monkeypatch, capsys, converted, "--first-token", "none") != expected
    assert said(monkeypatch, capsys, converted, "--first-token", BEGIN) == expected
    words = ["--load", theirs, "--use-cpu", "--prompt", "a", "--first-token"]
    for wrong in ("263", "-1", "bos"):
        assert tool(generate.main, monkeypatch, *words, wrong) == 2
        assert f"--first-token {wrong} must be eod, none, or an id from 0 to 262" in (
            capsys.readouterr().err
        )


@pytest.mark.ci
def test_what_is_trained_on_from_it_begins_so_and_no_other_run(
    theirs: Path, converted: Path, scratch: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def on(load: Path, name: str, *more: str) -> Path:
        done = alone(
            "--config", str(converted / "config.yaml"), "--mock-data", "--load", str(load), "--save",
            str(tmp_path / name), "--lr", "0.01", *more, without=FORMS,
        )  # fmt: skip
        assert done.rc == 0, done.err
        return tmp_path / name

    tuned = on(converted, "tuned", "--finetune", "--train-iters", "2")
    assert begins(tuned) == [BEGIN]
    resumed = on(tuned, "resumed", "--train-iters", "3", "--override-opt-param-scheduler")
    assert begins(resumed) == [BEGIN]
    lora = on(converted, "lora", "--finetune", "--train-iters", "2", "--lora-rank", "2")
    assert begins(lora) == [BEGIN] and list(load_model(lora).tokenizer.begins) == [BEGIN]
    assert begins(scratch) is None and not load_model(scratch).tokenizer.begins
    assert tool(convert.main, monkeypatch, resumed, tmp_path / "out") == 0
    assert said(monkeypatch, capsys, resumed) == said_by_theirs(tmp_path / "out")


FORMS = [
    "--vocab-size", "--num-layers", "--hidden-size", "--num-attention-heads", "--max-position-embeddings",
    "--seq-length", "--tokenizer-type",
]  # fmt: skip


def test_an_export_of_what_began_with_nothing_adds_nothing(
    scratch: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    transformers, out = needs("transformers"), tmp_path / "out"
    assert tool(convert.main, monkeypatch, scratch, out) == 0
    assert "NOTE: the model's texts begin with nothing" in capsys.readouterr().out
    ours, exported = load_model(scratch).tokenizer, transformers.AutoTokenizer.from_pretrained(out)
    for text in (*PROMPTS, "", "<s>the"[3:]):
        assert exported(text)["input_ids"] == ours.encode(text)
    assert not load_model(out).tokenizer.begins
    assert exported("a", "b")["input_ids"] == [*ours.encode("a"), *ours.encode("b")]
    assert said(monkeypatch, capsys, scratch) == said(monkeypatch, capsys, out)
    assert said(monkeypatch, capsys, scratch) == said_by_theirs(out)


def test_every_tool_begins_with_it_and_none_twice(theirs: Path, tmp_path: Path) -> None:
    tokenizer = load_model(theirs).tokenizer
    bare = tokenizer.encode("the")
    assert text_ids(tokenizer, "the") == [BEGIN, *bare] and text_ids(tokenizer, "") == [BEGIN]
    served = Served("tiny", tokenizer, 263, frozenset(), None, longest=64, answers=4)
    asked = completion({"prompt": ["the", ""]}, served)
    assert asked.prompts == [[BEGIN, *bare], [BEGIN]]  # usage counts these
    assert completion({"prompt": bare}, served).prompts == [bare]  # ids are as the client says
    one = Question("Which?", ["a", "b", "c", "d"], "A")
    subject = Subject("logic", "logic", "", [one], [one])
    (row,) = letter_rows(CEVAL, subject, one, tokenizer, shots=0, positions=400).rows
    assert row.tokens[0] == BEGIN and BEGIN not in row.tokens[1:]
    assert first_token(None, tokenizer, 263) == BEGIN
    assert first_token("none", tokenizer, 263) is None and first_token("eod", tokenizer, 263) == 261
    talk = [Message("user", "the"), Message("assistant", "thin"), Message("user", "inner")]
    for name, count in (("plain", 3), ("llama-2", 2)):
        ids = renderer_of(tokenizer, theirs, name, begins=tokenizer.begins).ids(talk)
        assert ids[0] == BEGIN and ids.count(BEGIN) == count
    taught = renderer_of(tokenizer, theirs, "plain")
    (tmp_path / "chat_template.jinja").write_text(taught.as_jinja())
    for asked_for in (None, "plain"):  # taught without it
        one_way = renderer_of(tokenizer, tmp_path, asked_for, begins=[BEGIN])
        assert one_way.ids(talk) == taught.ids(talk)


@pytest.mark.parametrize("add", [False, True])
def test_tokenizer_json_counts_whatever_is_said_beside_it(
    theirs: Path, tmp_path: Path, add: bool
) -> None:
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((theirs / name).read_bytes())
    beside = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "add_bos_token": add}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **beside})
    )
    tokenizer = load_model(tmp_path).tokenizer
    loaded = needs("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the")["input_ids"] == text_ids(tokenizer, "the") == [BEGIN, 257]


def test_perplexity_is_behind_it_by_default(theirs: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("the thin inner hint")

    def nats(*more: object) -> float:
        words = [
            "--load",
            theirs,
            "--text",
            tmp_path / "a.txt",
            "--json",
            tmp_path / "x",
            "--use-cpu",
        ]
        assert tool(evaluate.main, monkeypatch, *words, *more) == 0
        (found,) = json.loads((tmp_path / "x").read_text())["results"]
        return float(found["nats"])

    assert nats() == nats("--first-token", BEGIN) != nats("--first-token", "eod")
