"""What generate.py takes and refuses; the words that come out are those of the model."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.cli import generate
from megatron_lite.config.exit import run_tool
from megatron_lite.inference.model import build_model, find_model
from megatron_lite.parallel.context import ParallelContext
from tests.support.launch import start
from tests.support.spawn import spawn
from tests.support.tokenizers import write_gpt2
from tests.train.runs import alone

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a vocabulary (words/) and two iterations in bf16 of a run with it (run/)."""
    folder = tmp_path_factory.mktemp("spoken")
    (folder / "words").mkdir()
    data = write_gpt2(folder / "words", [("t", "h"), ("th", "e")])
    done = alone(
        "--mock-data", "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(data.vocab_file),
        "--merge-file", str(data.merge_file), "--save", str(folder / "run"), "--save-interval", "1",
        "--train-iters", "2", "--bf16", without=["--vocab-size"],
    )  # fmt: skip
    assert done.rc == 0, done.err
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    argv = ["generate.py", "--use-cpu", "--max-new-tokens", "5", *map(str, words)]
    monkeypatch.setattr(sys, "argv", argv)
    return run_tool(generate.main)


def foreign(folder: Path, merges: list[tuple[str, str]]) -> list[str]:
    folder.mkdir()
    data = write_gpt2(folder, merges)
    return ["--vocab-file", str(data.vocab_file), "--merge-file", str(data.merge_file)]


@pytest.mark.parametrize(
    ("merges", "sizes"),
    [
        ([("t", "h"), ("th", "e"), ("i", "n")], ("260 ids", "rows for 259")),
        ([("t", "h")], ("258 ids", "of 259 ids")),
        ([("h", "e"), ("t", "he")], ("259 ids", "of 259 ids")),
    ],
    ids=["more ids", "fewer ids", "as many"],
)
def test_a_foreign_vocabulary_is_refused_with_both_sizes(
    spoken: Path, tmp_path: Path, monkeypatch, capsys: Capture, merges, sizes
) -> None:
    words = ["--load", spoken / "run", "--prompt", "the", *foreign(tmp_path / "f", merges)]
    assert run(monkeypatch, *words) == 4
    err = capsys.readouterr().err
    assert all(size in err for size in sizes) and "Traceback" not in err, err
    code = 4 if len(merges) == 3 else 0  # an id without a row cannot be allowed
    assert run(monkeypatch, *words, "--allow-tokenizer-mismatch") == code


def test_an_older_checkpoint_compares_sizes(
    spoken: Path, tmp_path: Path, monkeypatch, capsys: Capture
) -> None:
    manifest = read_manifest(spoken / "run" / "iter_0000002")
    silent = dataclasses.replace(manifest, tokenizer={})
    monkeypatch.setattr(Store, "newest_intact", lambda store, step: (silent, []))
    words = ["--load", spoken / "run", *foreign(tmp_path / "f", [("t", "h")])]
    assert run(monkeypatch, *words) == 4
    assert "258 ids" in (err := capsys.readouterr().err) and "rows for 259" in err


def test_prompts_come_from_a_file_or_stdin(
    spoken: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffthe end\r\n\nother \n他".encode())
    words = ["--load", spoken / "run", "--temperature", "0"]
    assert run(monkeypatch, *words, "--prompt", "first", "--prompt-file", file) == 0
    out = capsys.readouterr().out
    assert [part.strip("\n")[:5] for part in out.split("-" * 80)] == [
        "first", "the e", "other", out.split("-" * 80)[3].strip("\n")[:5]]  # fmt: skip
    assert out.split("-" * 80)[3].lstrip("\n").startswith("他")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"the end\n")))
    assert run(monkeypatch, *words, "--prompt-file", "-") == 0
    assert capsys.readouterr().out.strip("\n") == out.split("-" * 80)[1].strip("\n")
    for content, said in (
        (b"ok\n\xff\n", "prompts.txt:2 is not UTF-8"),
        (b"\n \n"[:1], "no prompt"),
    ):
        file.write_bytes(content)
        assert run(monkeypatch, *words, "--prompt-file", file) == 2
        assert said in capsys.readouterr().err
    assert run(monkeypatch, *words, "--prompt-file", tmp_path) == 2
    os.mkfifo(tmp_path / "pipe")
    assert run(monkeypatch, *words, "--prompt-file", tmp_path / "pipe") == 2


def test_an_iteration_folder_is_its_iteration(spoken: Path, tmp_path, monkeypatch, capsys) -> None:
    words = ["--prompt", "the", "--temperature", "0"]
    first = spoken / "run" / "iter_0000001"
    assert run(monkeypatch, "--load", spoken / "run", "--ckpt-step", 1, *words) == 0
    expected = capsys.readouterr().out
    assert run(monkeypatch, "--load", first, *words) == 0
    assert capsys.readouterr().out == expected
    assert run(monkeypatch, "--load", first, "--ckpt-step", 2, *words) == 2
    assert "is iteration 1, --ckpt-step says 2" in capsys.readouterr().err
    (tmp_path / "best").mkdir()
    shutil.copy(first / "manifest.json", tmp_path / "best")
    assert run(monkeypatch, "--load", tmp_path / "best", *words) == 4
    assert "give it its name back" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "dtype"), [(None, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)]
)  # fmt: skip
def test_a_model_is_loaded_in_its_own_format(spoken: Path, asked, dtype) -> None:
    ctx = ParallelContext.serial()
    source = find_model(spoken / "run", ctx, step=2)
    model = build_model(source, ctx, dtype=asked)
    exact = build_model(source, ctx, dtype=torch.float32)
    for weight, master in zip(model.parameters(), exact.parameters(), strict=True):
        assert weight.dtype is dtype and torch.equal(weight, master.to(dtype))


def test_no_id_is_sampled_that_the_tokenizer_lacks(spoken: Path, tmp_path, monkeypatch) -> None:
    """--vocab-size gave the model more rows than the tokenizer has ids: they cannot be decoded."""
    made = ["--vocab-file", str(spoken / "words" / "my vocab"),
            "--merge-file", str(spoken / "words" / "my merges")]  # fmt: skip
    done = alone(
        "--mock-data", "--tokenizer-type", "GPT2BPETokenizer", *made, "--vocab-size", "900",
        "--save", str(tmp_path / "run"), "--save-interval", "2", "--train-iters", "2",
    )  # fmt: skip
    assert done.rc == 0, done.err
    assert run(monkeypatch, "--load", tmp_path / "run", "--temperature", "50",
               "--max-new-tokens", "15") == 0  # fmt: skip


def jsonl(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_batch_says_what_each_prompt_says_alone(spoken: Path, monkeypatch, capsys) -> None:
    words = ["--load", spoken / "run", "--jsonl", "--num-samples", 2, "--seed", 5]
    words += ["--top-k", 200, "--top-p", 0.99, "--min-p", 1e-6, "--repetition-penalty", 1.1]
    prompts = ["the", "a longer one", "x"]
    assert run(monkeypatch, *words, "--prompt", *prompts, "--batch-size", 4) == 0
    out, err = capsys.readouterr()
    together = jsonl(out)
    assert [(one["prompt"], one["sample"]) for one in together] == [
        (prompt, sample) for sample in (0, 1) for prompt in prompts
    ]
    assert re.search(r"^prefill \d+ tokens, [\d,.]+ tokens/s; decode \d+ tokens, [\d,.]+ tokens/s$",
                     err, re.MULTILINE)  # fmt: skip
    assert re.search(
        "^memory bound of decode: .* this CPU's bandwidth is not known", err, re.MULTILINE
    )
    assert len({one["text"] for one in together}) == 6
    alone = []
    for prompt in prompts:
        assert run(monkeypatch, *words, "--prompt", prompt, "--prefill-chunk", 2) == 0
        alone += jsonl(capsys.readouterr().out)
    alone.sort(key=lambda one: (one["sample"], prompts.index(one["prompt"])))
    assert alone == together
    assert run(monkeypatch, *words, "--prompt", *prompts, "--seed", 6) == 0
    assert jsonl(capsys.readouterr().out) != together


def test_a_stream_says_the_same_as_the_whole(spoken: Path, monkeypatch, capsys) -> None:
    words = ["--load", spoken / "run", "--prompt", "the", "other", "--num-samples", 2]
    assert run(monkeypatch, *words) == 0
    whole = capsys.readouterr().out
    assert run(monkeypatch, *words, "--stream") == 0
    assert capsys.readouterr().out == whole


def test_a_start_is_a_text_or_a_whole_file(spoken: Path, tmp_path, monkeypatch, capsys) -> None:
    words = ["--load", spoken / "run", "--temperature", 0, "--jsonl"]
    (tmp_path / "story").write_bytes("one\n\n他 two\n".encode())
    for given, prompt in (("a text", "a text"), (f"FILE:{tmp_path}/story", "one\n\n他 two\n")):
        assert run(monkeypatch, *words, "--start", given) == 0
        assert [one["prompt"] for one in jsonl(capsys.readouterr().out)] == [prompt]
    (tmp_path / "story").write_bytes(b"ok\xff")
    for given, said in (
        ("story", "byte 2 is not UTF-8"),
        ("missing", "cannot be read: No such file"),
    ):
        assert run(monkeypatch, *words, "--start", f"FILE:{tmp_path}/{given}") == 2
        assert said in capsys.readouterr().err


def test_a_stop_text_ends_a_continuation(spoken: Path, monkeypatch, capsys) -> None:
    words = ["--load", spoken / "run", "--prompt", "the", "--jsonl", "--temperature", 0]
    assert run(monkeypatch, *words) == 0
    (whole,) = jsonl(capsys.readouterr().out)
    assert whole["end"] == "length" and whole["tokens"] == 5
    stop = whole["text"][2:4]
    assert run(monkeypatch, *words, "--stop", "not there", stop) == 0
    (cut,) = jsonl(capsys.readouterr().out)
    assert cut["end"] == "stop" and cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_of_a_prompt_beyond_the_positions_the_end_is_read(
    spoken: Path, monkeypatch, capsys
) -> None:
    words = ["--load", spoken / "run", "--max-new-tokens", "5", "--jsonl", "--prompt", "the " * 200]
    assert run(monkeypatch, *words) == 0
    out, err = capsys.readouterr()
    assert jsonl(out)[0]["end"] == "positions"
    found = re.search(
        r"1 of --max-new-tokens 5: the model has (\d+) positions, .* the last (\d+) were read", err
    )
    assert found is not None and found[1] == found[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stream", "--jsonl"], "choose one"),
        (["--stop", ""], "--stop '' is in every text"),
        (["--batch-size", "0", "--top-p", "0.5"], "--batch-size 0 must be at least 1"),
        (["--top-p", "0", "--min-p", "2"], "2 problems with sampling"),
        (["--tensor-model-parallel-size", "2"], "are 2 ranks, 1 were started"),
        (["--prompt-file", "-", "--pipeline-model-parallel-size", "2"], "share one stdin"),
        (["--cache-tokens", "4"], "--sink-tokens 4 must be at least 0 and below --cache-tokens 4"),
        (["--sink-tokens", "2"], "--sink-tokens 2 is of --cache-tokens: give it too"),
        (["--memory-bandwidth", "nan"], "--memory-bandwidth nan must be a number above 0"),
        (["--cache-tokens", "9"], "this model has learned positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(spoken: Path, monkeypatch, capsys, words, said) -> None:
    assert run(monkeypatch, "--load", spoken / "run", *words) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("FATAL[2] ") and not out


def spoken_by(rank: int, ranks: int, folder: Path) -> str:
    """Standard output of a rank that torchrun started."""
    sys.argv = [
        "generate.py", "--load", str(folder / "run"), "--use-cpu", "--max-new-tokens", "5", "--jsonl",
        "--prompt", "the", "a longer one", "x", "--tensor-model-parallel-size", "2",
        "--pipeline-model-parallel-size", "2",
    ]  # fmt: skip
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert generate.main() == 0
    return out.getvalue()


@pytest.mark.ci
def test_a_rank_that_dies_is_named_by_the_others(spoken: Path) -> None:
    argv = ["--load", str(spoken / "run"), "--use-cpu", "--max-new-tokens", "5", "--prompt", "the",
            "--num-samples", "5000", "--tensor-model-parallel-size", "2"]  # fmt: skip
    with start(2, argv, tool="generate") as running:
        running.wait_for(0, "-" * 80)  # it speaks
        running.kill(1)
        ended = running.wait(120)  # gloo may not see it: heartbeats do, after a minute
    assert [one.rc for one in ended] == [6, -9]
    assert "rank 1" in ended[0].fatal and "Traceback" not in ended[0].err


@pytest.mark.ci
def test_ranks_of_tp_and_pp_say_what_one_says(spoken: Path, monkeypatch, capsys) -> None:
    words = ["--load", spoken / "run", "--jsonl", "--prompt", "the", "a longer one", "x"]
    assert run(monkeypatch, *words) == 0
    expected = capsys.readouterr().out
    assert spawn(spoken_by, 4, spoken, join=False) == [expected, "", "", ""]
