"""Ranks give tiktoken's ids; patterns are the published ones; Megatron's .json layout is read."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.build import build_tokenizer, read_vocab_size
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer, ranks_of, read_merges
from megatron_lite.data.tokenizers.tiktoken import PATTERNS, PUBLISHED, RANKS, TikTokenizer
from tests.data.texts import SENTENCES, hard_texts
from tests.support.extras import needs

tiktoken = needs("tiktoken")


@pytest.fixture(scope="module")
def ranks(files: tuple[str, str]) -> dict[bytes, int]:
    vocab = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    found = ranks_of(vocab, read_merges(files[1]))
    return {token: n for n, (token, _) in enumerate(sorted(found.items(), key=lambda x: x[1]))}


def write_text(path: Path, ranks: dict[bytes, int]) -> str:
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return str(path)


def write_json(path: Path, ranks: dict[bytes, int]) -> str:
    entries = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="ignore"),
        }
        for token, rank in ranks.items()
    ]
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_equal_tiktoken(ranks: dict[bytes, int], tmp_path: Path, pattern: str) -> None:
    path = write_text(tmp_path / "own.tiktoken", ranks)
    tokenizer = TikTokenizer(path, pattern=pattern)
    reference = tiktoken.Encoding(
        "own", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
    )
    texts = hard_texts()
    expected = [reference.encode_ordinary(text) for text in texts]
    found = tokenizer.encode_batch(texts)
    assert found.lengths.tolist() == [len(ids) for ids in expected]
    assert np.array_equal(found.ids, np.concatenate([np.array(i, np.int32) for i in expected]))
    for text in SENTENCES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eod == len(ranks) and tokenizer.vocab_size == len(ranks) + 1
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"


def test_patterns_are_those_tiktoken_publishes() -> None:
    public = needs("tiktoken_ext.openai_public")
    assert PATTERNS["gpt2"] == public.r50k_pat_str

    def constants(function: object) -> list[object]:
        found = function.__code__.co_consts  # type: ignore[attr-defined]
        return [*found, *("|".join(c) for c in found if c and isinstance(c, tuple)
                          and all(isinstance(part, str) for part in c))]  # fmt: skip

    assert PATTERNS["cl100k"] in constants(public.cl100k_base)
    assert PATTERNS["o200k"] in constants(public.o200k_base)


@pytest.mark.slow  # importing megatron-core takes seconds
def test_megatrons_patterns_are_its_own() -> None:
    library = needs("megatron.core.tokenizers.text.libraries.tiktoken_tokenizer")
    assert PATTERNS["v1"] == library._PATTERN_TIKTOKEN_V1
    assert PATTERNS["v2"] == library._PATTERN_TIKTOKEN_V2


@pytest.mark.slow  # importing megatron-core takes seconds
def test_a_json_file_gives_the_ids_of_megatron_core(
    ranks: dict[bytes, int], tmp_path: Path
) -> None:
    library = needs("megatron.core.tokenizers.text.libraries.tiktoken_tokenizer")
    bytewise = {bytes([b]): b for b in range(256)}
    longer = (token for token in ranks if len(token) > 1)
    ordered = bytewise | {token: 256 + n for n, token in enumerate(longer)}
    path = write_json(tmp_path / "vocab.json", ordered)
    size = len(ordered) - 50 + 20
    theirs = library.TikTokenTokenizer(path, num_special_tokens=20, vocab_size=size)
    data = DataConfig(
        tokenizer_type="TikTokenizer", tokenizer_model=path, tiktoken_num_special_tokens=20
    )
    ours = build_tokenizer(data, vocab_size=size)
    assert ours.vocab_size == read_vocab_size(data, vocab_size=size) == size
    assert ours.eod == theirs.eos_id
    for text in [text for text in hard_texts()[:400] if "<s>" not in text]:
        assert ours.encode(text) == theirs.text_to_ids(text)
    assert ours.decode([*ours.encode("fox"), ours.eod, 19]) == "fox</s><SPECIAL_19>"
    assert min(ours.encode("<s></s><unk>")) >= 20  # spelled out, they stay text


def test_published_names_know_their_pattern_and_specials(
    ranks: dict[bytes, int],
    files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RANKS, "r50k_base", len(ranks))
    tokenizer = TikTokenizer(write_text(tmp_path / "r50k_base.tiktoken", ranks))
    assert tokenizer.eod == PUBLISHED["r50k_base"][1]["<|endoftext|>"] == 50256
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode(SENTENCES[0]) == GPT2BPETokenizer(*files).encode(SENTENCES[0])


def test_wrong_files_and_flags_are_named(ranks: dict[bytes, int], tmp_path: Path) -> None:
    good = write_text(tmp_path / "own.tiktoken", ranks)
    as_json = write_json(tmp_path / "own.json", ranks)
    gap = write_text(tmp_path / "gap.tiktoken", {t: r for t, r in ranks.items() if r != 7})
    (tmp_path / "bad.tiktoken").write_bytes(b"IQ== 0\n!!\n")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    for arguments, message in [
        ((good, None, 1000), "--tiktoken-pattern is needed"),
        ((good, "v9", 1000), "--tiktoken-pattern v9: choose from gpt2"),
        ((as_json, None, 3), "at most 3"),
    ]:
        path, pattern, special = arguments
        with pytest.raises(ConfigError, match=message):
            TikTokenizer(path, pattern=pattern, num_special_tokens=special)
    with pytest.raises(ConfigError, match="--vocab-size 1200 leaves 200 ranks"):
        TikTokenizer(as_json, vocab_size=1200)
    for wrong, message in [
        (None, "needs --tokenizer-model"),
        (gap, "not 0 to"),
        (str(tmp_path / "bad.tiktoken"), r"bad.tiktoken:2: b'!!' is not `base64 rank`"),
        (str(tmp_path / "bad.json"), "not a list of rank"),
        (write_text(tmp_path / "cl100k_base.tiktoken", ranks), "cl100k_base has 100256: it is cut"),
    ]:
        with pytest.raises(DataError, match=message):
            TikTokenizer(wrong, pattern="gpt2")
