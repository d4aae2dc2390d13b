"""Folders whose vocabulary is tokenizer.model alone: Llama 2's, ChatGLM2's, those of own runs; in and out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.cli import convert, generate, preprocess_data
from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.exchange import files_for_huggingface, section_for
from megatron_lite.data.tokenizers.sentencepiece import CHATGLM_SPECIALS
from megatron_lite.data.tokenizers.sentencepiece_folder import unlike_transformers
from megatron_lite.data.tokenizers.training import SentencePieceSettings, train_sentencepiece
from megatron_lite.data.vocabulary import folder_tokenizer
from megatron_lite.inference.model import load_model
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.huggingface import tool
from tests.train.runs import run_main

sentencepiece = needs("sentencepiece")
transformers = needs("transformers")
Capture = pytest.CaptureFixture[str]

TEXTS = ["the other thing they think, 3 things", "在中国的人们", "tab\tand é,  two"]
PIECES, ROWS = 330, 340
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
         "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}  # fmt: skip


@pytest.fixture(scope="module")
def model_file() -> bytes:
    settings = SentencePieceSettings(kind="bpe", vocab_size=PIECES)
    return train_sentencepiece(TEXTS * 20, settings)


def folder_of(path: Path, model_file: bytes, config: dict[str, Any], rows: int = ROWS) -> Path:
    """A tiny Llama with its tokenizer.model."""
    tiny("llama", vocab_size=rows, bos_token_id=1, eos_token_id=2).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(model_file)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.ci
def test_a_llama_2_goes_in_prepares_text_is_trained_and_goes_out_as_it_came(
    tmp_path: Path, monkeypatch, model_file: bytes
) -> None:
    folder = folder_of(tmp_path / "theirs", model_file, LLAMA)
    ours, run, out = (tmp_path / name for name in ("ours", "run", "out"))
    assert tool(convert.main, monkeypatch, folder, ours) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    assert all(ids[0] == 1 for ids in expected)

    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    words = ("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--workers", 1,
             "--tokenizer-type", "Llama2Tokenizer", "--append-eod",
             "--tokenizer-model", ours / "tokenizer" / "tokenizer.model")  # fmt: skip
    assert tool(preprocess_data.main, monkeypatch, *words) == 0
    written = IndexedDataset(str(tmp_path / "out_text_document"))
    assert [list(written[n]) for n in range(len(TEXTS))] == [[*ids, 2] for ids in expected]

    done = run_main(
        "--config", str(ours / "config.yaml"), "--load", str(ours), "--finetune", "--save", str(run),
        "--save-interval", "1", "--use-cpu", "--data-path", str(tmp_path / "out_text_document"),
        "--train-iters", "1", "--eval-iters", "0", "--micro-batch-size", "1", "--split", "1,0,0",
        "--global-batch-size", "1", "--lr", "1e-3", "--num-workers", "0",
    )  # fmt: skip
    assert done.rc == 0, done.err
    assert tool(convert.main, monkeypatch, run, out, "--dtype", "f32") == 0
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((out / "generation_config.json").read_bytes())["eos_token_id"] == 2
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert [again(text)["input_ids"] for text in TEXTS] == expected
    assert again.chat_template == LLAMA["chat_template"]
    for place in (folder, out, run):
        assert load_model(place).tokenizer.encode(TEXTS[0]) == expected[0]


def test_a_text_is_continued_from_such_a_folder_as_it_lies(
    tmp_path: Path, monkeypatch, capsys: Capture, model_file: bytes
) -> None:
    folder = folder_of(tmp_path / "theirs", model_file, LLAMA, PIECES)
    words = ("--load", folder, "--prompt", "the thin", "--temperature", 0, "--max-new-tokens", 5)
    assert tool(generate.main, monkeypatch, *words, "--use-cpu") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([theirs("the thin")["input_ids"]])
    answer = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
        ids, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    expected = load_model(folder).tokenizer.decode(answer[0].tolist())
    assert capsys.readouterr().out.strip() == expected.strip()


@pytest.mark.parametrize(("rows", "five"), [(PIECES + 5, True), (PIECES + 4, False)])
def test_chatglm_2_s_class_has_its_five_where_the_model_has_rows_for_them(
    tmp_path: Path, model_file: bytes, rows: int, five: bool
) -> None:
    """The 64,793 rows of baby-llama are one too few for 64,789 pieces and five."""
    files = {"tokenizer.model": model_file,
             "tokenizer_config.json": b'{"tokenizer_class": "ChatGLMTokenizer"}'}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = folder_tokenizer(tmp_path, files, {}, rows=rows, positions=9, default_ends={})
    section = found.section(tmp_path)
    assert section["tokenizer_type"] == "GPTSentencePieceTokenizer"
    assert section.get("chatglm_special_tokens", False) == five
    tokenizer: Any = found.tokenizer
    names = CHATGLM_SPECIALS if five else ()
    assert tokenizer.specials == {name: PIECES + n for n, name in enumerate(names)}
    assert found.facts["eod"] == tokenizer.eod == 2
    data = DataConfig(**section)
    if five:  # what came is what goes out
        assert files_for_huggingface(data, positions=9) == files


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama2Tokenizer", {}),
        ("GPTSentencePieceTokenizer", {}),
        ("GPTSentencePieceTokenizer", {"chatglm_special_tokens": True}),
        ("SentencePieceTokenizer", {}),
    ],
    ids=["llama 2", "plain", "chatglm", "megatron"],
)
def test_a_run_s_own_model_goes_out_with_a_config_by_which_transformers_gives_its_ids(
    tmp_path: Path, model_file: bytes, kind: str, more: dict[str, Any]
) -> None:
    (tmp_path / "my own.model").write_bytes(model_file)
    path, out = str(tmp_path / "my own.model"), tmp_path / "out"
    data = DataConfig(tokenizer_type=kind, tokenizer_model=path, **more)  # type: ignore[arg-type]
    files = files_for_huggingface(data, positions=24)
    out.mkdir()
    for name, content in files.items():
        (out / name).write_bytes(content)
    (out / "config.json").write_text('{"model_type": "llama"}')
    own: Any = build_tokenizer(data)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert [theirs(text)["input_ids"] for text in TEXTS] == [own.encode(text) for text in TEXTS]
    assert theirs.eos_token_id == own.eod and len(theirs) == own.vocab_size
    assert {name: theirs.convert_tokens_to_ids(name) for name in own.specials} == own.specials
    eos = json.loads(files["tokenizer_config.json"])["eos_token"]
    section = section_for(files, out, eos=eos, rows=own.vocab_size)
    again = build_tokenizer(DataConfig(**section))
    assert again.fingerprint() == own.fingerprint()


def test_what_transformers_cannot_do_is_said_or_refused(tmp_path: Path) -> None:
    for kind in ("bpe", "unigram"):
        made = {"model_prefix": str(tmp_path / kind), "model_type": kind, "vocab_size": 60}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20), hard_vocab_limit=False, minloglevel=2, **made
        )
        path = str(tmp_path / f"{kind}.model")
        data = DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=path)
        if kind == "unigram":
            with pytest.raises(DataError, match="is a Unigram model"):
                files_for_huggingface(data, positions=9)
        else:
            files = files_for_huggingface(data, positions=9)
            (said,) = unlike_transformers(files)
            assert "replaces characters and makes several spaces one" in said
            assert not unlike_transformers({**files, "tokenizer.json": b"{}"})


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda p: _cut(p), "tokenizer.model"),
    "another end": (
        lambda p: (p / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}'),
        "names the eos_token '<unk>', id 0; the tokenizer ends documents with id 2",
    ),
    "no such end": (
        lambda p: (p / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}'),
        "which none of its 330 tokens is",
    ),
    "too many": (lambda p: _fewer_rows(p), "no row"),
}


def _cut(folder: Path) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:-999])


def _fewer_rows(folder: Path) -> None:
    tiny("llama", vocab_size=PIECES - 1, bos_token_id=1, eos_token_id=2).save_pretrained(folder)


@pytest.mark.parametrize("name", SPOILED)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, monkeypatch, capsys: Capture, model_file: bytes, name: str
) -> None:
    change, reason = SPOILED[name]
    folder = folder_of(tmp_path / "theirs", model_file, LLAMA)
    change(folder)
    assert tool(convert.main, monkeypatch, folder, tmp_path / "ours") == 4
    assert reason in capsys.readouterr().err and not (tmp_path / "ours").exists()
    assert tool(convert.main, monkeypatch, folder, tmp_path / "ours", "--no-tokenizer") == 0
