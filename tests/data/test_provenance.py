"""Token files say which tokenizer made them; whoever reads them together or by another is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_lite.cli import check_dataset, dataset_stats, merge_datasets, ngrams
from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import run_tool
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.build import Datasets, build_datasets
from megatron_lite.data.preparing.check import check_hashes, verify
from megatron_lite.data.preparing.encode import Job
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.data.provenance import MadeWith, made_with, maker, read_facts
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.storage.disk import Disk
from tests.support.corpora import write_pair
from tests.support.tokenizers import write_gpt2

MERGES = {"a": [("t", "h"), ("th", "e")], "b": [("h", "e"), ("t", "he")]}  # as many ids


class Corpus:
    """The same text by two tokenizers of as many ids, and once by a program that says nothing."""

    def __init__(self, folder: Path) -> None:
        text = folder / "text.jsonl"
        text.write_text('{"text": "the three others"}\n' * 60, encoding="utf-8")
        self.data: dict[str, DataConfig] = {}
        self.makers: dict[str, MadeWith] = {}
        for name, merges in MERGES.items():
            (folder / name).mkdir()
            self.data[name] = data = write_gpt2(folder / name, merges)
            self.makers[name] = made_with(build_tokenizer(data), data)
            preprocess(
                Job(data, append_eod=True), inputs=[str(text)], output_prefix=str(folder / name),
                workers=1, disk=Disk(),
            )  # fmt: skip
        self.a, self.b = (str(folder / f"{name}_text_document") for name in "ab")
        self.silent = str(folder / "silent")
        write_pair(self.silent, [[5, 6, 7, 8] * 5] * 60, np.uint16)

    def flags(self, name: str) -> list[str]:
        """The tokenizer as tools take it."""
        data = self.data[name]
        return ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(data.vocab_file),
                "--merge-file", str(data.merge_file)]  # fmt: skip

    def build(self, name: str, vocab_size: int = 259, **where: Any) -> Datasets:
        """What a run with the tokenizer reads."""
        return build_datasets(
            DataConfig(**({"split": "80,10,10"} | where)), seq_length=4, seed=1, train_samples=8,
            valid_samples=2, test_samples=2, vocab_size=vocab_size, eod=258, cache_folder=None,
            tokenizer=self.makers[name],
        )  # fmt: skip

    def copied(self, folder: Path) -> Corpus:
        """The pairs once more, for a test that changes them."""
        mine = copy.copy(self)
        mine.makers = dict(self.makers)
        for name in ("a", "b", "silent"):
            prefix = Path(getattr(self, name))
            for file in prefix.parent.glob(f"{prefix.name}.*"):
                shutil.copy(file, folder)
            setattr(mine, name, str(folder / prefix.name))
        return mine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def corpus(made: Corpus, tmp_path: Path) -> Corpus:
    return made.copied(tmp_path)


def test_the_facts_name_the_tokenizer_and_its_end_of_document(corpus: Corpus) -> None:
    found = maker(read_facts(corpus.a))
    assert found is not None and not found.differs(corpus.makers["a"])
    assert (found.eod, found.vocab_size, found.ends_documents) == (258, 259, True)
    assert found.source == corpus.data["a"].vocab_file
    assert found.differs(corpus.makers["b"])


@pytest.mark.parametrize(
    "where",
    [
        lambda c: {"data_path": [c.b]},
        lambda c: {"data_path": ["0.5", c.a, "0.5", c.b]},
        lambda c: {"data_path": [c.a, c.b]},
        lambda c: {"train_data_path": [c.a], "valid_data_path": [c.b], "split": None},
    ],
    ids=["a file", "a blend", "a blend without weights", "evaluation"],
)
def test_a_file_of_another_tokenizer_is_refused_with_both_names(corpus: Corpus, where) -> None:
    with pytest.raises(DataError) as refused:
        corpus.build("a", **where(corpus))
    for word in (f"{corpus.b}.meta.json", corpus.makers["a"].fingerprint[:12], "this run's",
                 corpus.makers["b"].fingerprint[:12], "--allow-tokenizer-mismatch"):  # fmt: skip
        assert word in str(refused.value)
    with pytest.raises(DataError, match="the vocabulary has 100"):
        corpus.build("a", vocab_size=100, **where(corpus), allow_tokenizer_mismatch=True)
    told = corpus.build("a", **where(corpus), allow_tokenizer_mismatch=True).notices
    assert len(told) == 1 and told[0].startswith("--allow-tokenizer-mismatch: ")


def test_a_blend_is_refused_where_nobody_names_a_tokenizer(corpus: Corpus) -> None:
    corpus.makers["a"] = MadeWith()
    with pytest.raises(DataError, match="but .*a_text_document was made with GPT2BPETokenizer"):
        corpus.build("a", data_path=[corpus.a, corpus.b])


def test_another_end_of_document_is_another_tokenizer(corpus: Corpus) -> None:
    path = Path(f"{corpus.a}.meta.json")
    facts = json.loads(path.read_bytes())
    facts["tokenizer"]["eod"] = 7
    path.write_text(json.dumps(facts))
    with pytest.raises(DataError, match="end of document 7.*end of document 258"):
        corpus.build("a", data_path=[corpus.a])
    path.write_text(json.dumps(facts | {"append_eod": False}))  # then it stands nowhere
    assert corpus.build("a", data_path=[corpus.a]).notices == ()


def test_a_file_that_says_nothing_is_compared_by_ids(corpus: Corpus) -> None:
    assert corpus.build("a", data_path=[corpus.a]).notices == ()
    (said,) = corpus.build("a", data_path=["1", corpus.a, "2", corpus.silent]).notices
    assert said.startswith(f"no .meta.json says which tokenizer made {corpus.silent}: only the ids")
    with pytest.raises(DataError, match=r"silent.bin: token 3 is token id 8, the vocabulary has 8"):
        corpus.build("a", vocab_size=8, data_path=[corpus.silent])


def test_facts_of_another_pair_are_refused(corpus: Corpus) -> None:
    Path(f"{corpus.silent}.meta.json").write_bytes(Path(f"{corpus.a}.meta.json").read_bytes())
    with pytest.raises(DataError, match="it belongs to another pair"):
        corpus.build("a", data_path=[corpus.silent])
    for broken in ("[]", '{"tokenizer": 5}', "{", '{"tokens": "many"}', '{"skipped": [1]}'):
        Path(f"{corpus.silent}.meta.json").write_text(broken)
        with pytest.raises(DataError, match="silent.meta.json cannot be read"):
            corpus.build("a", data_path=[corpus.silent])
    Path(f"{corpus.silent}.meta.json").unlink()
    os.mkfifo(f"{corpus.silent}.meta.json")  # nobody writes into it
    with pytest.raises(DataError, match="is a named pipe, not a regular file"):
        corpus.build("a", data_path=[corpus.silent])


def test_a_pair_written_anew_loses_the_old_facts(corpus: Corpus) -> None:
    write_pair(corpus.a, [[1, 2]], np.uint16)
    assert read_facts(corpus.a) is None


def run(tool: ModuleType, *words: str) -> int:
    return run_tool(lambda: int(tool.main(list(words))), argv=words)


def test_tools_refuse_what_training_refuses(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "both")
    merge = ["--input", corpus.a, corpus.b, "--output-prefix", out]
    for tool, words in [
        (merge_datasets, merge),
        (dataset_stats, [corpus.a, corpus.b]),
        (dataset_stats, [corpus.a, "--samples", "1", *corpus.flags("b")]),
    ]:
        assert run(tool, *words) == 3
        err = capsys.readouterr().err
        assert all(made.fingerprint[:12] in err for made in corpus.makers.values()), err
        assert run(tool, *words, "--allow-tokenizer-mismatch") == 0
        assert "NOTE: --allow-tokenizer-mismatch: " in capsys.readouterr().err
    assert read_facts(out) is None  # nobody made it as a whole
    with pytest.raises(DataError, match="made with"):
        ngrams.measure_ngrams(
            ["1", corpus.a, "1", corpus.b], split="80,20,0", held_out="valid", vocab_size=None
        )


def test_statistics_show_no_ids_a_tokenizer_lacks(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(corpus.silent, [[5, 4000]], np.uint16)
    words = [corpus.silent, "--samples", "1", *corpus.flags("a")]
    assert run(dataset_stats, *words) == 3
    assert "token id 4000" in capsys.readouterr().err
    assert run(dataset_stats, *words, "--allow-tokenizer-mismatch") == 0
    assert "5 4000" in capsys.readouterr().out


def test_a_merged_pair_keeps_the_facts(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "twice")
    copy = str(tmp_path / "copy")
    assert run(merge_datasets, "--input", corpus.a, "--output-prefix", copy) == 0
    assert run(merge_datasets, "--input", corpus.a, copy, "--output-prefix", out) == 0
    found, once = read_facts(out), read_facts(corpus.a)
    assert found is not None and once is not None
    assert found["tokens"] == 2 * once["tokens"] and found["documents"] == 120
    assert found["tokenizer"] == once["tokenizer"] and check_hashes(out)
    assert not corpus.build("a", data_path=[corpus.a, out]).notices
    capsys.readouterr()
    mixed = ["--input", out, corpus.silent, "--output-prefix", str(tmp_path / "mixed")]
    assert run(merge_datasets, *mixed) == 0
    assert "no .meta.json says" in capsys.readouterr().err
    assert read_facts(str(tmp_path / "mixed")) is None


def test_no_id_is_outside_its_own_tokenizer(corpus: Corpus) -> None:
    assert verify(corpus.a).highest == 258
    path = Path(f"{corpus.a}.meta.json")
    facts = json.loads(path.read_bytes())
    facts["tokenizer"]["vocab_size"] = 200
    path.write_text(json.dumps(facts))
    with pytest.raises(DataError, match="not below the vocabulary's 200 ids"):
        verify(corpus.a, vocab_size=50000)
    assert run(check_dataset, corpus.a) == 3
