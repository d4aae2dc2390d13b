"""SentencePiece ids equal the library's, by every engine; appended tokens are Megatron's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.build import build_tokenizer, read_vocab_size
from megatron_lite.data.tokenizers.sentencepiece import (
    CHATGLM_SPECIALS,
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    SentencePieceTokenizer,
)
from megatron_lite.data.tokenizers.sentencepiece_file import ModelFile, ModelPiece
from megatron_lite.data.tokenizers.training import SentencePieceSettings, train_sentencepiece
from tests.data.texts import SENTENCES, hard_texts
from tests.support.extras import needs

sentencepiece = needs("sentencepiece")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = SentencePieceSettings(kind=request.param, vocab_size=420, max_token_chars=5)
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(SENTENCES * 20, settings))
    return str(path)


def texts_short_enough() -> list[str]:
    """The library is quadratic on very long words."""
    return [text[:3000] for text in hard_texts()]


@pytest.mark.parametrize("engine", ["auto", "sentencepiece"])
def test_ids_equal_the_library(model: str, engine: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=model)
    tokenizer = GPTSentencePieceTokenizer(model, engine=engine)
    texts = texts_short_enough()
    expected = reference.encode(texts)
    found = tokenizer.encode_batch(texts)
    assert found.lengths.tolist() == [len(ids) for ids in expected]
    assert np.array_equal(found.ids, np.concatenate([np.array(i, np.int32) for i in expected]))
    assert tokenizer.encode(SENTENCES[2]) == reference.encode(SENTENCES[2])
    assert tokenizer.vocab_size == reference.vocab_size() and tokenizer.eod == reference.eos_id()
    for text in SENTENCES:
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text))
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


def test_a_hundred_thousand_of_one_character_equal_the_library(model: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=model)
    tokenizer = GPTSentencePieceTokenizer(model)
    text = "。" * 33_000 + "a"
    assert tokenizer.encode_batch([text]).ids.tolist() == reference.encode(text)


def test_chatglm_specials_follow_the_pieces_and_are_written_out(model: str) -> None:
    data = DataConfig(
        tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=model,
        chatglm_special_tokens=True,
    )  # fmt: skip
    tokenizer: Any = build_tokenizer(data)
    size = sentencepiece.SentencePieceProcessor(model_file=model).vocab_size()
    assert tokenizer.specials == {name: size + n for n, name in enumerate(CHATGLM_SPECIALS)}
    assert tokenizer.vocab_size == read_vocab_size(data) == size + 5
    ids = [*tokenizer.encode("fox"), size + 1, *tokenizer.encode("dog")]
    assert tokenizer.decode(ids) == "fox[gMASK]dog"
    assert size + 1 not in tokenizer.encode_batch(["[gMASK] sop"]).ids
    plain = GPTSentencePieceTokenizer(model)
    assert plain.fingerprint() != tokenizer.fingerprint()


def test_megatrons_tokens_are_appended_in_its_order(model: str, tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(model)
    size = GPTSentencePieceTokenizer(model).vocab_size
    names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>"]  # the model has padding, begin and end
    assert tokenizer.specials == {name: size + n for n, name in enumerate(names)}
    assert tokenizer.eod == size + 2 and tokenizer.decode([size + 2]) == "<EOD>"
    bare = tmp_path / "bare.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=bare.open("wb"), vocab_size=100,
        hard_vocab_limit=False, bos_id=-1, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    assert list(SentencePieceTokenizer(str(bare)).specials) == [*names, "<PAD>", "<BOS>", "<EOS>"]
    with pytest.raises(DataError, match="no end-of-sentence piece"):
        _ = GPTSentencePieceTokenizer(str(bare)).eod


def test_llama_2_begins_every_text_and_ends_documents_with_the_models_end(
    model: str, tmp_path: Path
) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=model)
    data = DataConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=model)
    tokenizer = build_tokenizer(data)
    texts = [*SENTENCES, "", SENTENCES[0]]
    expected = [[reference.bos_id(), *reference.encode(text)] for text in texts]
    found = tokenizer.encode_batch(texts)
    assert found.lengths.tolist() == [len(ids) for ids in expected]
    assert found.ids.tolist() == [token for ids in expected for token in ids]
    assert found.ids.dtype == np.int32
    assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.eod == reference.eos_id()
    assert tokenizer.vocab_size == read_vocab_size(data) == reference.vocab_size()
    plain = GPTSentencePieceTokenizer(model)
    assert plain.fingerprint() != tokenizer.fingerprint()
    bare = tmp_path / "bare.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=bare.open("wb"), vocab_size=100,
        hard_vocab_limit=False, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match="no begin-of-sentence piece"):
        Llama2Tokenizer(str(bare))


def test_wrong_files_and_a_missing_library_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (tmp_path / "a.model").write_bytes(b"no model")
    for wrong, message in [
        (None, "needs --tokenizer-model"),
        ("/no/model", "--tokenizer-model /no/model cannot be read"),
        (str(tmp_path / "a.model"), "is no SentencePiece model"),
    ]:
        with pytest.raises(DataError, match=message):
            GPTSentencePieceTokenizer(wrong)
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"\.\[sentencepiece\]"):
        GPTSentencePieceTokenizer(model)


def test_chatglm_2_s_file_gives_its_ids(tmp_path: Path) -> None:
    """As large as the real one, which has a licence of its own: 64,789 pieces, then five ids."""
    plain = train_sentencepiece(SENTENCES * 20, SentencePieceSettings(kind="bpe", vocab_size=420))
    trained = ModelFile.read(plain, "small.model")
    others = [f"片{number}" for number in range(64_789 - len(trained.pieces))]
    added = [ModelPiece(text, -1e6 - place) for place, text in enumerate(others)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained.with_pieces(added))
    data = DataConfig(
        tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(path),
        chatglm_special_tokens=True,
    )  # fmt: skip
    tokenizer: Any = build_tokenizer(data)
    assert tokenizer.specials == {
        "[MASK]": 64789, "[gMASK]": 64790, "[sMASK]": 64791, "sop": 64792, "eop": 64793,
    }  # fmt: skip
    assert tokenizer.vocab_size == read_vocab_size(data) == 64794
    assert (tokenizer.unknown, tokenizer.eod) == (0, 2)
    assert tokenizer.decode([64790, 64792, *tokenizer.encode("fox"), 64793]) == "[gMASK]sopfoxeop"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in SENTENCES:
        assert tokenizer.encode(text) == reference.encode(text)
    assert max(tokenizer.encode("[gMASK] sop eop")) < 64789, "text that spells one stays text"
