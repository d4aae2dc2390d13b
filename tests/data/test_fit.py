"""Half a tokenizer is refused by name; whole ones of every shape are taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.fit import is_one_word
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, GPT2BPETokenizer, byte_characters
from tests.support.extras import needs

MERGES = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("Ã", "©"), ("Ġ", "Ġ"), ("1", "2")]
SPECIALS = [GPT2_EOD, "<pad>", "[MASK]", "madeupword0000", "<fim_prefix>", "<|im_start|>", "▁pad"]


def gpt2(
    folder: Path, merges: list[tuple[str, str]] = MERGES, text: str | None = None
) -> DataConfig:
    """The whole vocabulary beside other merges."""
    tokens = [*byte_characters(), *(a + b for a, b in MERGES), *SPECIALS]
    (folder / "vocab.json").write_text(json.dumps({t: n for n, t in enumerate(tokens)}))
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(lines if text is None else text, encoding="utf-8")
    return DataConfig(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))


def test_a_whole_vocabulary_with_special_tokens_is_taken(tmp_path: Path) -> None:
    assert build_tokenizer(gpt2(tmp_path), engine="plain").vocab_size == 256 + 6 + 7


@pytest.mark.parametrize(
    ("merges", "named"),
    [(MERGES[:3], "makes 3 of the 269 tokens .* 'Ã©' \\(id 259\\)"), ([], "its 0 merges makes 6"),
     (MERGES[:-1], "'12'"), (MERGES[1:], "'th'"), (MERGES[:4] + MERGES[5:], "'ĠĠ'")],
    ids=["half", "empty", "without the last", "without the first", "without one"],
)  # fmt: skip
def test_merges_that_do_not_make_the_vocabulary_are_refused(
    tmp_path: Path, merges: list[tuple[str, str]], named: str
) -> None:
    data = gpt2(tmp_path, merges)
    with pytest.raises(DataError, match=f"--merge-file {data.merge_file}: .*{named}"):
        GPT2BPETokenizer(data.vocab_file, data.merge_file, engine="plain")


def test_an_empty_file_and_a_line_cut_in_half_are_refused(tmp_path: Path) -> None:
    for text in ("", "#version: 0.2\n", "#version: 0.2\nt h\nĠ t"):
        data = gpt2(tmp_path, text=text)
        with pytest.raises(DataError, match="--merge-file"):
            build_tokenizer(data)


def test_a_word_is_what_merges_could_make() -> None:
    assert all(
        map(is_one_word, [" the", "'ll", "   ", "\n", "42", " 7", "...", "né", "他们", "12"])
    )
    assert not any(map(is_one_word, ["<s>", "<|endoftext|>", "a1", "[PAD]", "two words", "x_y"]))


def hugging_face(folder: Path, *, by_bytes: bool, keep: int, ignore: bool = False) -> DataConfig:
    """A tokenizer.json of which `keep` of four merges are left."""
    tokenizers = needs("tokenizers")
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d")]
    singles = byte_characters() if by_bytes else list("thean d")
    tokens = [*singles, *(a + b for a, b in merges), "<s>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    fast.add_special_tokens(["<s>", "pad"])
    if by_bytes:
        fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    found = json.loads(fast.to_str())
    found["model"] |= {"merges": found["model"]["merges"][:keep], "ignore_merges": ignore}
    (folder / "tokenizer.json").write_text(json.dumps(found))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    return DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))


@pytest.mark.parametrize("by_bytes", [True, False])
def test_a_tokenizer_json_without_half_its_merges_is_refused(
    tmp_path: Path, by_bytes: bool
) -> None:
    assert build_tokenizer(hugging_face(tmp_path, by_bytes=by_bytes, keep=4)).eod > 0
    for keep in (0, 2, 3):
        with pytest.raises(DataError, match=f"no merge makes {4 - keep} of the 5 tokens"):
            build_tokenizer(hugging_face(tmp_path, by_bytes=by_bytes, keep=keep))
    whole_words = hugging_face(tmp_path, by_bytes=by_bytes, keep=2, ignore=True)
    assert build_tokenizer(whole_words).eod > 0  # its vocabulary is looked up before any merge


def test_a_sentencepiece_model_cut_behind_a_piece_is_refused(tmp_path: Path) -> None:
    library = needs("sentencepiece")
    path = tmp_path / "words.model"
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["the other thing they think"] * 20), minloglevel=2,
        model_prefix=str(path.with_suffix("")), vocab_size=30, hard_vocab_limit=False,
    )  # fmt: skip
    data = DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(path))
    content = path.read_bytes()
    assert build_tokenizer(data).vocab_size > 10
    ends, at = [], 0
    while content[at] == 10:  # a piece: tag, size of one byte, the piece
        at += 2 + content[at + 1]
        ends.append(at)
    for end in (ends[5], ends[-1]):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=f"cut off at {end} bytes"):
            build_tokenizer(data)
    path.write_bytes(content[: ends[5] + 1])
    with pytest.raises(DataError, match="is no SentencePiece model"):
        build_tokenizer(data)
