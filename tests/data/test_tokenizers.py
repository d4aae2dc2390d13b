"""Ids equal the reference libraries'; text comes back; a wrong file is named with its flag."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig, TokenizerType
from megatron_lite.data.tokenizers.build import (
    TOKENIZERS,
    asked_vocab_size,
    build_tokenizer,
    planned_vocab_size,
    read_vocab_size,
)
from megatron_lite.data.tokenizers.gpt2_bpe import (
    GPT2_EOD,
    GPT2BPETokenizer,
    byte_characters,
    read_merges,
)
from megatron_lite.data.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_lite.data.tokenizers.null import NullTokenizer
from tests.support.extras import needs

needs("regex")

HARD = [
    "",
    " ",
    "\n\n\t  x  \n",
    "Hello, world! I'll say it's they've we'd",
    "naïve café — ﬁne",
    "你好，世界。？！“引号”（括号）",
    "😀👨‍👩‍👧‍👦🇩🇪 e\u0301",
    "\u0000\u0001\x7f\ufeff\u2028",
    "𠮷𝒜\U0010ffff",
    "a" * 5000,
    " " * 300 + "end",
    "abc123DEF_foo.bar(x)[0]=3.14e-10",
    "العربية עברית हिन्दी ไทย",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A small vocabulary: all bytes, forty merges, EOD last."""
    folder = tmp_path_factory.mktemp("vocabulary")
    merges = [
        *[("Ġ", c) for c in "taowsbc"],
        *[(a, b) for a, b in zip("hierntes", "ensrdgti", strict=True)],
        ("t", "he"),
        ("Ġt", "he"),
        ("a", "a"),
        ("aa", "aa"),
        ("aaaa", "aaaa"),
        ("Ġ", "Ġ"),
        ("ĠĠ", "ĠĠ"),
        ("ä", "½"),
        ("ä½", "ł"),
        ("Ċ", "Ċ"),
        ("1", "2"),
        ("ł", "å"),
    ]
    tokens = [*byte_characters(), *dict.fromkeys(a + b for a, b in merges), GPT2_EOD]
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


@pytest.mark.parametrize("text", HARD)
def test_plain_fast_and_transformers_give_equal_ids_and_the_text_comes_back(
    files: tuple[str, str], text: str
) -> None:
    needs("tokenizers")
    plain, fast = GPT2BPETokenizer(*files, engine="plain"), GPT2BPETokenizer(*files)
    ids = plain.encode(text)
    assert fast.encode(text) == ids
    assert plain.decode(ids) == fast.decode(ids) == text
    assert GPT2_EOD not in text or plain.eod not in ids


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_plain_equals_fast_on_any_text(files: tuple[str, str], text: str) -> None:
    needs("tokenizers")
    plain, fast = GPT2BPETokenizer(*files, engine="plain"), GPT2BPETokenizer(*files)
    assert plain.encode(text) == fast.encode(text)


def test_ids_equal_transformers_gpt2(files: tuple[str, str]) -> None:
    transformers = needs("transformers")
    reference = transformers.GPT2Tokenizer(vocab=files[0], merges=files[1])
    plain = GPT2BPETokenizer(*files, engine="plain")
    for text in HARD[:-1]:  # the last spells a special token, which stays text here
        assert plain.encode(text) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("engine", ["plain", "tokenizers", "tiktoken", "gigatoken"])
def test_a_batch_equals_its_texts(files: tuple[str, str], engine: str) -> None:
    if engine != "plain":
        needs(engine)
    tokenizer = GPT2BPETokenizer(*files, engine=engine)
    batch = tokenizer.encode_batch(HARD)
    expected = [tokenizer.encode(text) for text in HARD]
    assert batch.lengths.tolist() == [len(ids) for ids in expected]
    assert batch.ids.tolist() == [token for ids in expected for token in ids]
    assert batch.ids.dtype == np.int32
    assert tokenizer.encode_batch([]).ids.size == 0
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


def test_vocabulary_size_and_eod(files: tuple[str, str]) -> None:
    data = DataConfig(vocab_file=files[0], merge_file=files[1])
    tokenizer = build_tokenizer(data)
    assert tokenizer.vocab_size == read_vocab_size(data) == tokenizer.eod + 1
    assert tokenizer.decode([tokenizer.eod]) == GPT2_EOD
    again = GPT2BPETokenizer(*files, engine="plain")
    assert again.fingerprint() == tokenizer.fingerprint()


def test_broken_utf8_becomes_the_replacement_character(files: tuple[str, str]) -> None:
    tokenizer = GPT2BPETokenizer(*files)
    assert tokenizer.decode(tokenizer.encode("ï")[:1]) == "\ufffd"


def test_reading_the_size_needs_no_torch(files: tuple[str, str]) -> None:
    program = (
        "import sys\n"
        "from megatron_lite.config.sections.data import DataConfig\n"
        "from megatron_lite.data.tokenizers.build import read_vocab_size\n"
        "print(read_vocab_size(DataConfig(vocab_file=sys.argv[1])))\n"
        "assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, files[0]], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == GPT2BPETokenizer(*files).vocab_size


def test_wrong_files_are_named_with_flag_and_path(files: tuple[str, str], tmp_path: Path) -> None:
    vocab = json.loads(Path(files[0]).read_text(encoding="utf-8"))

    def written(content: bytes) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
        path.write_bytes(content)
        return str(path)

    def vocab_with(content: object) -> str:
        return written(json.dumps(content).encode())

    (tmp_path / "no.json").write_text("{")
    missing_byte = {token: number for number, token in enumerate(list(vocab)[1:])}
    for vocab_file, merge_file, message in [
        (None, files[1], "needs --vocab-file"),
        (files[0], None, "needs --merge-file"),
        ("/no/v.json", files[1], "--vocab-file /no/v.json cannot be read: No such file"),
        (files[0], "/no/m.txt", "--merge-file /no/m.txt cannot be read"),
        (str(tmp_path / "no.json"), files[1], "is no JSON"),
        (vocab_with([1]), files[1], "one JSON object"),
        (vocab_with({"a": 0, "b": 2}), files[1], "0 to 1, each once"),
        (vocab_with({"a": "0"}), files[1], "no integer"),
        (files[0], written(b"#version: 0.2\na b c\n"), r"txt:2: 'a b c' is not two"),
        (files[0], written(b"z z\n"), "different vocabularies"),
        (files[0], written(b"\xff\xfe"), "no UTF-8"),
    ]:
        with pytest.raises(DataError, match=message):
            GPT2BPETokenizer(vocab_file, merge_file)
    with pytest.raises(DataError, match="lacks 1 of the 256 byte tokens"):
        GPT2BPETokenizer(vocab_with(missing_byte), written(b""))
    marked = written(b"\xef\xbb\xbf" + Path(files[1]).read_bytes())  # as some editors begin a file
    assert read_merges(marked) == read_merges(files[1])
    del vocab[GPT2_EOD]
    with pytest.raises(DataError, match=re.escape(f"has no {GPT2_EOD!r}")):
        _ = GPT2BPETokenizer(vocab_with(vocab), files[1]).eod
    with pytest.raises(ConfigError, match="--tokenizer-type Nope.*GPT2BPETokenizer"):
        build_tokenizer(DataConfig(tokenizer_type="Nope"))  # type: ignore[arg-type]


def test_huggingface_files_load_from_file_or_folder(files: tuple[str, str], tmp_path: Path) -> None:
    tokenizers = needs("tokenizers")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens([GPT2_EOD, "<|user|>"])
    fast.enable_truncation(3)
    fast.save(str(tmp_path / "tokenizer.json"))
    reference = GPT2BPETokenizer(*files)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path))
        tokenizer = build_tokenizer(data)
        assert tokenizer.vocab_size == read_vocab_size(data) == reference.vocab_size + 1
        assert tokenizer.eod == reference.eod
        for text in HARD:  # not truncated, and a spelled special token stays text
            assert tokenizer.encode(text) == reference.encode(text)
        assert (
            tokenizer.encode_batch(HARD).ids.tolist() == reference.encode_batch(HARD).ids.tolist()
        )
        assert tokenizer.decode(tokenizer.encode("naïve 你好")) == "naïve 你好"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|user|>"}')
    assert HuggingFaceTokenizer(str(tmp_path)).eod == reference.vocab_size
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    for wrong, message in [
        (None, "needs --tokenizer-model"),
        ("gpt2", "not downloaded"),
        (str(tmp_path / "bad"), "no model.vocab"),
    ]:
        with pytest.raises(DataError, match=message):
            HuggingFaceTokenizer(wrong)


def test_what_a_post_processor_puts_before_a_text_is_known_and_not_encoded(
    files: tuple[str, str], tmp_path: Path
) -> None:
    tokenizers = needs("tokenizers")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    fast.add_special_tokens([GPT2_EOD, "<s>"])
    first, end = fast.token_to_id("<s>"), fast.token_to_id(GPT2_EOD)
    for single, begins in (
        ("<s> $A", [first]),
        (f"<s> {GPT2_EOD} $A {GPT2_EOD}", [first, end]),
        ("$A <s>", []),
    ):
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", first), (GPT2_EOD, end)]
        )
        fast.save(str(tmp_path / "tokenizer.json"))
        tokenizer = HuggingFaceTokenizer(str(tmp_path))
        assert list(tokenizer.begins) == begins and first not in tokenizer.encode("the")
    assert GPT2BPETokenizer(*files).begins == ()


def test_every_tokenizer_of_the_flag_is_built_and_no_other() -> None:
    assert list(TOKENIZERS) == list(get_args(TokenizerType))


def test_null_tokenizer_takes_numbers_and_adds_eod() -> None:
    tokenizer = NullTokenizer(100)
    assert tokenizer.vocab_size == 101 and tokenizer.eod == 100
    assert tokenizer.encode("3 99 0") == [3, 99, 0] and tokenizer.decode([3, 99]) == "3 99"
    for wrong, message in [("100", "id 100 is not below"), ("x", "numbers separated")]:
        with pytest.raises(DataError, match=message):
            tokenizer.encode(wrong)
    data = DataConfig(tokenizer_type="NullTokenizer")
    assert read_vocab_size(data, vocab_size=100) == 101 == planned_vocab_size(data, 100)[0]
    assert asked_vocab_size(data, 101) == 100 and asked_vocab_size(DataConfig(), 101) == 101
    with pytest.raises(DataError, match="--vocab-size"):
        build_tokenizer(data)


def test_without_the_library_the_plain_version_works_and_without_both_the_extra_is_named(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = GPT2BPETokenizer(*files).encode("Hello 你好")
    for package in ("tokenizers", "tiktoken", "gigatoken"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "plain; " in GPT2BPETokenizer(*files).choice.describe()
    assert GPT2BPETokenizer(*files).encode("Hello 你好") == expected
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"\.\[tokenizers\]"):
        HuggingFaceTokenizer(str(tmp_path))
    for package in ("regex", "tiktoken", "gigatoken"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"\.\[tokenizers\].*\.\[fast\]"):
        GPT2BPETokenizer(*files).encode("x")
