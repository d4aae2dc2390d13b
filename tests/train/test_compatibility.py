"""A resumed run reads what the checkpoint was trained with, or is told what changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.cli import generate as generate_tool
from megatron_lite.config.errors import CheckpointError, DataError
from megatron_lite.train.compatibility import check_tokenizer
from tests.support.corpora import growing, write_pair
from tests.support.tokenizers import write_gpt2
from tests.train.runs import Outcome, alone, curve, steps


def corpus(prefix: Path, seed: int, documents: int = 60) -> str:
    """Random documents of ids below 60."""
    prefix.parent.mkdir(exist_ok=True)
    return write_pair(prefix, growing(documents, seed))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[list[str], Path]:
    """(flags, run folder) of two steps over a blend of two files."""
    a, b = corpus(tmp_path / "data" / "a", 7), corpus(tmp_path / "data" / "b", 11)
    words = ["--data-path", "0.3", a, "0.7", b, "--split", "80,10,10", "--save-interval", "2"]
    folder = tmp_path / "run"
    done = alone(*words, "--save", str(folder), "--exit-interval", "2")
    assert done.rc == 0, done.err
    return words, folder


def again(words: list[str], folder: Path, *changed: str) -> Outcome:
    """The two steps that are left, kept beside the run."""
    return alone(*words, "--load", str(folder), "--save", f"{folder}-again", *changed)


def test_the_same_data_elsewhere_are_the_same_data(trained, tmp_path: Path) -> None:
    words, folder = trained
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    moved = [word.replace(f"{tmp_path}/data", f"{tmp_path}/copy") for word in words]
    here, there = tmp_path / "run-again", tmp_path / "elsewhere"
    assert again(words, folder).rc == 0
    assert again(moved, folder, "--save", str(there)).rc == 0
    assert curve(steps(here)) == curve(steps(there)) and len(steps(here)) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--data-path", "0.4", "A", "0.6", "B"], "train: A: weight 0.3 -> 0.4"),
        (["--data-path", "0.7", "B", "0.3", "A"], "train: B: its files hold other tokens than that"),
        (["--data-path", "A"], "train: 2 datasets -> 1 (without B)"),
        (["--data-path", "0.3", "A", "0.7", "C"], "train: C: its files hold other tokens than that"),
        (["--split", "90,5,5"], "train: A: documents 0 to 47 -> 0 to 53 (--split)"),
        (["--seed", "1"], "--seed: 1234 -> 1"),
        (["--dataloader-type", "cyclic"], "--dataloader-type: single -> cyclic"),
        (["--train-iters", "90", "--lr-decay-iters", "4"], "1 epochs -> "),
    ],
)  # fmt: skip
def test_other_data_are_refused_with_what_changed(
    trained, tmp_path: Path, changed: list[str], said: str
) -> None:
    words, folder = trained
    corpus(tmp_path / "data" / "c", 13)
    places = {name.upper(): str(tmp_path / "data" / name) for name in "abc"}
    changed = [places.get(word, word) for word in changed]
    for short, path in places.items():
        said = said.replace(f": {short}:", f": {path}:").replace(
            f"without {short}", f"without {path}"
        )
    done = again(words, folder, *changed)
    assert done.rc == DataError.exit_code, done.err
    assert said in done.err and "--allow-data-change" in done.err
    done = again(words, folder, *changed, "--allow-data-change", "--exit-interval", "3")
    assert done.rc == 0, done.err
    assert "--allow-data-change: " in done.out and said in done.out
    assert steps(Path(f"{folder}-again"))[0].iteration == 3


def test_files_written_anew_are_refused_by_their_content(trained, tmp_path: Path) -> None:
    words, folder = trained
    for suffix in (".bin", ".idx"):
        (tmp_path / "data" / f"b{suffix}").unlink()
    prefix = corpus(tmp_path / "data" / "b", 13)
    done = again(words, folder)
    assert done.rc == DataError.exit_code and f"train: {prefix}: its files hold other" in done.err


def test_a_longer_run_of_the_same_epoch_goes_on(trained) -> None:
    words, folder = trained
    done = again(words, folder, "--train-iters", "6", "--lr-decay-iters", "4")
    assert done.rc == 0, done.err


def test_finetuning_on_other_data_needs_no_word(trained, tmp_path: Path) -> None:
    words, folder = trained
    other = corpus(tmp_path / "data" / "c", 13)
    done = again(words, folder, "--data-path", other, "--finetune", "--exit-interval", "1")
    assert done.rc == 0, done.err


def test_another_vocabulary_size_is_refused_with_both(trained) -> None:
    words, folder = trained
    done = again(words, folder, "--vocab-size", "70")
    assert done.rc == CheckpointError.exit_code
    assert "a vocabulary of 61 ids (padded to 64)" in done.err
    assert "this run's tokenizer has 71 (padded to 72)" in done.err
    assert "--vocab-size" not in done.err


def test_rows_that_no_id_has_are_asked_for_again() -> None:
    manifest = SimpleNamespace(iteration=3, tokenizer={"vocab_size": 1000})
    now = {"type": "GPT2BPETokenizer", "vocab_size": 300}
    with pytest.raises(CheckpointError, match=r"more rows than ids, give --vocab-size 1000$"):
        check_tokenizer(manifest, now, allowed=False)


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> tuple[list[str], Path]:
    """(flags, run folder) of a run with a GPT-2 tokenizer of its own."""
    (tmp_path / "words").mkdir()
    data = write_gpt2(tmp_path / "words", [("t", "h"), ("th", "e")])
    prefix = corpus(tmp_path / "data" / "a", 7)
    words = [
        "--data-path", prefix, "--split", "80,10,10", "--save-interval", "2",
        "--tokenizer-type", "GPT2BPETokenizer",
        "--vocab-file", str(data.vocab_file), "--merge-file", str(data.merge_file),
    ]  # fmt: skip
    folder = tmp_path / "run"
    done = alone(*words, "--save", str(folder), "--exit-interval", "2", without=["--vocab-size"])
    assert done.rc == 0, done.err
    return words, folder


def test_another_tokenizer_of_the_same_size_is_refused(with_tokenizer, tmp_path: Path) -> None:
    words, folder = with_tokenizer
    write_gpt2(tmp_path / "words", [("h", "e"), ("t", "he")])  # the same place, as many ids
    load = [*words, "--load", str(folder)]
    done = alone(*load, without=["--vocab-size"])
    assert done.rc == CheckpointError.exit_code
    assert "another tokenizer of as many ids: tokenizer fingerprint" in done.err
    done = alone(*load, "--allow-data-change", without=["--vocab-size"])
    assert done.rc == 0 and "--allow-data-change: tokenizer fingerprint" in done.out


def test_the_data_of_another_tokenizer_are_refused_at_every_start(
    with_tokenizer, tmp_path: Path
) -> None:
    words, folder = with_tokenizer
    facts = {"type": "HuggingFaceTokenizer", "fingerprint": "fedcba9876543210", "eod": 7}
    (tmp_path / "data" / "a.meta.json").write_text(json.dumps({"tokenizer": facts}))
    for start in (
        words,
        [*words, "--load", str(folder)],
        [*words, "--load", str(folder), "--finetune"],
        [*words, "--load", str(folder), "--skip-train", "--eval-iters", "1"],
    ):
        done = alone(*start, without=["--vocab-size"])
        assert done.rc == DataError.exit_code, done.err
        assert (
            "made with HuggingFaceTokenizer (end of document 7, fingerprint fedcba987654"
            in done.err
        )
        assert "this run's tokenizer is GPT2BPETokenizer" in done.err
    done = alone(*words, "--allow-tokenizer-mismatch", "--vocab-size", "250")
    assert "--vocab-size 250: the tokenizer has 259 ids, so many rows are made" in done.out
    assert done.rc == 0 and " > end of document: id 258, '<|endoftext|>'" in done.out


def generate(*words: str) -> str:
    """What tools/generate.py prints."""
    out, before = io.StringIO(), sys.argv
    sys.argv = ["generate.py", *words]
    try:
        with contextlib.redirect_stdout(out):
            assert generate_tool.main() == 0
    finally:
        sys.argv = before
    return out.getvalue()


def test_a_run_folder_speaks_without_the_original_files(with_tokenizer, tmp_path: Path) -> None:
    _, folder = with_tokenizer
    files = read_manifest(folder / "iter_0000002").files
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= files.keys()
    asked = ["--load", str(folder), "--use-cpu", "--prompt", "the", "--max-new-tokens", "5"]
    said = generate(*asked)
    shutil.rmtree(tmp_path / "words")
    shutil.rmtree(tmp_path / "data")
    assert generate(*asked) == said and said.startswith("the")


def test_a_damaged_tokenizer_makes_the_checkpoint_damaged(with_tokenizer, tmp_path: Path) -> None:
    words, folder = with_tokenizer
    vocab = folder / "iter_0000002" / "tokenizer" / "vocab.json"
    vocab.write_bytes(vocab.read_bytes().replace(b"the", b"hte"))
    done = alone(*words, "--load", str(folder), without=["--vocab-size"])
    assert done.rc == CheckpointError.exit_code and "tokenizer/vocab.json is damaged" in done.err


@pytest.mark.parametrize("version", [1, 3])
def test_older_checkpoints_load_and_newer_ones_say_so(trained, version: int) -> None:
    """Version 1 knew neither its data nor its tokenizer, and hashed files whole."""
    words, folder = trained
    path = folder / "iter_0000002" / "manifest.json"
    body = json.loads(path.read_bytes())["body"]
    body["version"] = version
    if version == 1:
        del body["tokenizer"], body["data"]
        for name, entry in body["files"].items():
            content = (path.parent / name).read_bytes()
            body["files"][name] = {
                "bytes": entry["bytes"],
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "body": body}))
    done = again(words, folder, "--split", "90,5,5")
    if version == 1:
        assert done.rc == 0, done.err
    else:
        assert done.rc == CheckpointError.exit_code and "this program reads" in done.err
