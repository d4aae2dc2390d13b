"""What evaluate.py says, keeps and refuses; the numbers are those of tests/inference."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.cli import convert, evaluate
from megatron_lite.inference.evaluating.scorer import Scorer
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash
from tests.support.corpora import write_pair
from tests.support.extras import needs
from tests.support.huggingface import tool, weights

needs("transformers")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held out.txt"
    path.write_text("the thin inner hint that this ether tin, the thing in other words then.")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_keeps_each_evaluation_beside_its_own_records(
    tmp_path: Path, monkeypatch, folder: Path, text: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert tool(convert.main, monkeypatch, folder, run) == 0
    (run / "metrics.jsonl").write_text('{"kind": "save"}\n')
    before = contents(run)
    told = tmp_path / "new" / "told.json"
    words = ["--text", text, "--window", 16, "--use-cpu"]
    capsys.readouterr()
    assert tool(evaluate.main, monkeypatch, "--load", run, *words, "--json", told) == 0
    out = capsys.readouterr().out
    assert tool(evaluate.main, monkeypatch, "--load", run / "iter_0000000", *words) == 0
    assert tool(evaluate.main, monkeypatch, "--load", folder, *words) == 0
    after = contents(run)
    kept = sorted(set(after) - set(before))
    assert {name: after[name] for name in before} == before and len(kept) == 2
    assert all(name.startswith("evaluations/iter_0000000_") for name in kept)
    record = json.loads(told.read_text())
    assert record in [json.loads(after[name]) for name in kept]
    (found,) = record["results"]
    assert (record["iteration"], record["dtype"], record["tp"]) == (0, "float32", 1)
    assert (found["window"], found["stride"], found["size"]) == (16, 8, 71)
    line = next(line for line in out.splitlines() if line.startswith(str(text)))
    assert line.split()[-4:] == [str(found["tokens"]), f"{found['loss']:.4f}",
                                 f"{found['perplexity']:,.3f}", f"{found['bits_per_byte']:.4f}"]  # fmt: skip
    assert "stride 8: beyond a first window a token sees 9 to 16 before it" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "nothing is asked: give --text FILE"),
        (["--text", "no/such"], 3, "--text no/such cannot be read: No such file"),
        (["--tokens", "no/such"], 3, "no/such.idx does not exist"),
        (["--text", "HERE/latin.txt"], 3, "latin.txt:3 is not UTF-8"),
        (["--text", "HERE/empty.txt"], 3, "empty.txt holds no token to score"),
        (["--tokens", "HERE/other"], 3, "but the model's tokenizer is"),
        (["--text", "HERE/latin.txt", "--batch-size", 0], 2, "--batch-size 0 must be at least 1"),
        (["--text", "HERE/good.txt", "--window", 25], 2, "at most the model's 24 positions"),
        (["--text", "HERE/good.txt", "--tensor-model-parallel-size", 2], 2, "are 2 ranks, 1 were started"),
        (["--text", "HERE/good.txt", "--json", "HERE"], 2, "is a folder"),
        (["--lm-eval", "toy"], 2, "--lm-eval needs lm-eval-harness, the extra megatron_lite[eval]"),
        (["--text", "HERE/good.txt", "--num-fewshot", 1], 2, "--num-fewshot is of --lm-eval: give it too"),
        (["--text", "HERE/good.txt", "--include-path", "HERE"], 2, "--include-path is of --lm-eval: give it"),
        (["--ceval", "HERE", "--stride", 1], 2, "--stride is of --text, --tokens: give one of them too"),
        (["--gsm8k", "HERE", "--shots", 2], 2, "--shots 2: --gsm8k shows solved problems of --gsm8k-examples"),
        (["--text", "HERE/good.txt", "--shots", 5], 2, "--shots is of --ceval, --mmlu, --gsm8k: give one"),
        (["--ceval", "HERE"], 3, "holds no val/<subject>_val.csv"),
        (["--mmlu", "HERE", "--exam-split", "val"], 3, "holds no val/<subject>_val.csv"),
        (["--gsm8k", "HERE/good.txt"], 3, "--gsm8k HERE/good.txt:1 is no JSON"),
        (["--ceval", "HERE", "--shots", -1], 2, "--shots -1 must be at least 0"),
        (["--ceval", "HERE", "--limit", 0], 2, "--limit 0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch, folder: Path, capsys: Capture, words, code: int, said: str
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where the extra is not installed
    weights(lambda t: t["transformer.wte.weight"][3].fill_(float("nan")))(folder)
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\nth\xffree\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "good.txt").write_text("the thin")
    write_pair(tmp_path / "other", [[1, 2, 3]])
    facts = {"tokenizer": {"type": "GPT2BPETokenizer", "fingerprint": "0" * 32, "vocab_size": 99}}
    (tmp_path / "other.meta.json").write_text(json.dumps(facts))
    words = [str(word).replace("HERE", str(tmp_path)) for word in words]
    assert tool(evaluate.main, monkeypatch, "--load", folder, "--use-cpu", *words) == code
    err = capsys.readouterr().err
    said = said.replace("HERE", str(tmp_path))
    assert err.startswith(f"FATAL[{code}] ") and said in err and "Traceback" not in err


def test_a_run_that_takes_no_file_is_evaluated_all_the_same(
    tmp_path: Path, monkeypatch, folder: Path, text: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert tool(convert.main, monkeypatch, folder, run) == 0
    (run / "evaluations").touch()
    assert tool(evaluate.main, monkeypatch, "--load", run, "--text", text, "--use-cpu") == 0
    out, err = capsys.readouterr()
    assert "perplexity of" in out and "kept in" not in out
    assert "WARNING: the run keeps no record: " in err and (run / "evaluations").is_file()


@pytest.fixture
def run(tmp_path: Path, monkeypatch, folder: Path, capsys: Capture) -> Path:
    assert tool(convert.main, monkeypatch, folder, tmp_path / "run") == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_a_crash_or_a_full_disk_leaves_a_whole_record_or_none(
    tmp_path: Path, monkeypatch, run: Path, text: Path, capsys: Capture
) -> None:
    before, told = contents(run), tmp_path / "told.json"
    words = ["--load", run, "--text", text, "--use-cpu", "--json", told]

    def written() -> dict[str, bytes]:
        after = contents(tmp_path)
        assert {name: after[f"run/{name}"] for name in before} == before
        new = {
            n: c
            for n, c in after.items()
            if n.endswith(".json") and n.startswith(("told", "run/eval"))
        }
        assert all(json.loads(content)["results"][0]["tokens"] for content in new.values())
        return new

    recording, early = RecordingDisk(), []

    def scorer(*given: Any) -> Scorer:  # made when all is checked
        early.append(len(recording.operations))
        return Scorer(*given)

    monkeypatch.setattr(evaluate, "Scorer", scorer)
    monkeypatch.setattr(evaluate, "Disk", lambda: recording)
    assert tool(evaluate.main, monkeypatch, *words) == 0 and len(written()) == 2
    found = 0
    for number in range(len(recording.operations)):
        for path in (told, *(run / "evaluations").glob("*")):
            path.unlink(missing_ok=True)
        disk = FaultyDisk(fail_at=number, crash="raise", tear=True)
        monkeypatch.setattr(evaluate, "Disk", lambda disk=disk: disk)
        with pytest.raises(SimulatedCrash):
            tool(evaluate.main, monkeypatch, *words)
        found += len(written())
        disk = FaultyDisk(fail_at=number, error=errno.ENOSPC, lasting=True)
        monkeypatch.setattr(evaluate, "Disk", lambda disk=disk: disk)
        capsys.readouterr()
        code = tool(evaluate.main, monkeypatch, *words)
        out, err = capsys.readouterr()
        # found at the start, and nothing is measured; or later, and the numbers are said all the same
        assert code in (0, 5) and ("perplexity of" in out or number < early[0])
        written()
    assert found > 0


def test_a_reader_that_leaves_does_not_cost_the_record(monkeypatch, run: Path, text: Path) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(evaluate, "print", closed, raising=False)
    with contextlib.suppress(BrokenPipeError, SystemExit):
        tool(evaluate.main, monkeypatch, "--load", run, "--text", text, "--use-cpu")
    (file,) = (run / "evaluations").iterdir()
    assert json.loads(file.read_text())["results"][0]["tokens"] > 0


@pytest.mark.parametrize("of_run", [True, False])
def test_a_damaged_model_is_refused(
    monkeypatch, run: Path, folder: Path, text: Path, capsys: Capture, of_run: bool
) -> None:
    load = run if of_run else folder
    file = max(load.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    assert tool(evaluate.main, monkeypatch, "--load", load, "--text", text, "--use-cpu") == 4
    out, err = capsys.readouterr()
    assert (
        err.splitlines()[-1].startswith("FATAL[4] ")
        and str(load) in err
        and "perplexity" not in out
    )
    assert not (run / "evaluations").exists() or not list((run / "evaluations").iterdir())
