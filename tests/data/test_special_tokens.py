"""Which id ends a document and which stands for the unknown is said, counted and never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lite.cli import preprocess_data
from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import run_tool
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.provenance import read_facts
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.kept import files_to_keep, from_kept
from tests.support.extras import needs
from tests.support.tokenizers import hugging_face

Capture = pytest.CaptureFixture[str]


def name_eos(folder: Path, **files: object) -> DataConfig:
    """A tokenizer.json with t, h, e, th and <end>, and what the files beside it call eos_token."""
    data = hugging_face(folder)
    (folder / "tokenizer_config.json").unlink()
    for name, token in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token": token}))
    return data


@pytest.mark.parametrize("beside", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("token", ["</s>", {"content": "<eos>", "special": True}])
def test_an_eos_token_that_the_tokenizer_lacks_is_refused(
    tmp_path: Path, beside: str, token: object
) -> None:
    name = token if isinstance(token, str) else "<eos>"
    with pytest.raises(
        DataError, match=f"{beside}.json names the eos_token {name!r}, which .* lacks"
    ):
        build_tokenizer(name_eos(tmp_path, **{beside: token}))


@pytest.mark.parametrize("token", [2, {}, ["<end>", "th"], {"content": None}])
def test_an_eos_token_that_is_no_text_is_refused_not_guessed(tmp_path: Path, token: object) -> None:
    with pytest.raises(
        DataError, match="tokenizer_config.json: eos_token is .* no text of a token"
    ):
        build_tokenizer(name_eos(tmp_path, tokenizer_config=token))


def test_two_files_that_name_two_ends_are_refused(tmp_path: Path) -> None:
    data = name_eos(tmp_path, tokenizer_config="<end>", special_tokens_map="th")
    with pytest.raises(DataError, match="'<end>' by tokenizer_config.json and 'th' by special_tok"):
        build_tokenizer(data)


def test_the_map_of_special_tokens_ends_documents_and_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    data = name_eos(tmp_path / "a", special_tokens_map={"content": "th"}, tokenizer_config=None)
    assert build_tokenizer(data).eod == 3
    (tmp_path / "kept").mkdir()
    for name, content in files_to_keep(data).items():
        (tmp_path / "kept" / name).write_bytes(content)
    assert build_tokenizer(from_kept(data, tmp_path / "kept")).eod == 3


def run(
    folder: Path, data: DataConfig, texts: list[str], *words: str
) -> tuple[int, dict[str, int]]:
    """preprocess_data.py's exit code and the facts it leaves."""
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    argv = ["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "out"),
            "--workers", "1", "--overwrite", "--tokenizer-type", data.tokenizer_type,
            "--tokenizer-model", str(data.tokenizer_model), *words]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["preprocess_data.py", *argv])
        code = run_tool(preprocess_data.main)
    return code, read_facts(folder / "out_text_document") or {}


def with_unknown(folder: Path, eos: str) -> DataConfig:
    """The same tokenizer, in which <unk> stands for all other characters."""
    data = hugging_face(folder)
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["vocab"]["<unk>"] = 5
    found["model"]["unk_token"] = "<unk>"
    path.write_text(json.dumps(found))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return data


@pytest.mark.parametrize("eos", ["<end>", "<unk>"])
def test_unknown_tokens_are_counted_and_many_are_told(
    tmp_path: Path, capsys: Capture, eos: str
) -> None:
    data = with_unknown(tmp_path, eos)
    code, facts = run(tmp_path, data, ["the", "tXe", "the" * 1000], "--append-eod")
    said = capsys.readouterr()
    assert code == 0 and facts["unknown"] == 1 and facts["eods"] == 3
    assert "unknown: 1 tokens (0.04" in said.out and "WARNING" not in said.err
    assert f"end of document: id {4 if eos == '<end>' else 5}, '{eos}'\n" in said.out
    code, facts = run(tmp_path, data, ["the", "tXe", "the" * 400], "--append-eod")
    said = capsys.readouterr()
    assert code == 0 and facts["unknown"] == 1
    assert "WARNING: " in said.err and "0.12% of the text's tokens are unknown (id 5" in said.err


def test_the_end_of_document_is_told_where_it_is_not_appended(
    tmp_path: Path, capsys: Capture
) -> None:
    data = hugging_face(tmp_path)
    code, facts = run(tmp_path, data, ["the"])
    said = capsys.readouterr()
    assert "id 4, '<end>', not appended (--append-eod is not given)" in said.out
    assert code == 0 and facts["tokenizer"]["eod"] == 4 and not facts["append_eod"]  # type: ignore[index]


def test_a_tokenizer_that_loses_text_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(tmp_path, hugging_face(tmp_path), ["the"])[0] == 0
    assert "leaves out characters that its vocabulary lacks" in caplog.text


def test_sentencepiece_counts_its_unknown_piece(tmp_path: Path, capsys: Capture) -> None:
    library = needs("sentencepiece")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["the other thing they think"] * 20), minloglevel=2,
        model_prefix=str(tmp_path / "w"), vocab_size=30, hard_vocab_limit=False,
    )  # fmt: skip
    data = DataConfig(
        tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(tmp_path / "w.model")
    )
    code, facts = run(tmp_path, data, ["the thing", "the 他们 thing"], "--append-eod")
    assert code == 0 and facts["unknown"] == 1 and "WARNING: " in capsys.readouterr().err
    lines = [json.dumps({"prompt": "the thing", "answer": "the thing"}) + "\n"] * 3
    (tmp_path / "talk.jsonl").write_text("".join(lines))
    code, _ = run(tmp_path, data, [], "--input", str(tmp_path / "talk.jsonl"),
                  "--chat", "--chat-template", "plain")  # fmt: skip
    said = capsys.readouterr()
    assert code == 0 and "WARNING" not in said.err, "a mask's zeros are no unknown tokens"
    assert said.out.count("unknown: 0 tokens") == 1
