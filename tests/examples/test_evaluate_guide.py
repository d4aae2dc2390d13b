"""The commands of the guide on evaluation, run as they are printed, in this process where they start one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.cli import convert, evaluate
from megatron_lite.inference.model import load_model
from tests.support.ceval_toy import write_exam
from tests.support.corpora import write_pair
from tests.support.extras import needs
from tests.support.huggingface import gpt2, tokenizer_files, tool
from tests.support.places import ROOT

GUIDE = ROOT / "docs/guides/evaluate.md"


def commands() -> list[list[str]]:
    text = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, a model of Hugging Face's, and what the guide measures."""
    needs("transformers")
    gpt2(n_head=4, n_positions=200).save_pretrained(tmp_path / "gpt2")
    tokenizer_files(tmp_path / "gpt2", "vocab.json", "merges.txt")
    assert tool(convert.main, monkeypatch, tmp_path / "gpt2", tmp_path / "run") == 0
    text = "the thin inner hint that this ether tin, the thing in other words then."
    (tmp_path / "held_out.txt").write_text(text)
    ids = load_model(tmp_path / "run").tokenizer.encode(text)
    write_pair(tmp_path / "held_out_text_document", [[*ids, 261], [*ids[:9], 261]])
    write_exam(tmp_path / "ceval")
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        lines = "Which is first?,a,b,c,d,A\n" * 5
        (tmp_path / "mmlu" / split / f"virology_{split}.csv").write_text(lines)
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        problem = json.dumps({"question": "Two and two?", "answer": "2+2=4\n#### 4"})
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(f"{problem}\n{problem}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.ci
def test_the_guide_goes_as_printed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    here = [words for words in commands() if "--lm-eval" not in words and words[0] != "pip"]
    assert len(commands()) - len(here) == 2  # tests/oracles/test_harness.py runs them
    for words in here:
        assert words[0] == "python", words
        if words[1] == "tools/evaluate.py":
            capsys.readouterr()
            assert tool(evaluate.main, monkeypatch, *words[2:]) == 0, capsys.readouterr().err
            found.append(capsys.readouterr().out)
            continue
        assert words[1] == "tools/launch.py"
        scripts = [str(ROOT / word) if word.startswith("tools/") else word for word in words[1:]]
        done = subprocess.run(
            [sys.executable, *scripts, "--use-cpu"], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    first = next(line for line in found[0].splitlines() if line.startswith("held_out.txt"))
    assert first in found[-1], "a layout changed a number"
    (told,) = json.loads((place / "perplexity.json").read_text())["results"]
    assert (told["window"], told["stride"]) == (16, 4)
    told = json.loads((place / "choices.json").read_text())["results"]
    assert [one["questions"] for one in told] == [120, 5]
    assert len(list((place / "run" / "evaluations").iterdir())) == sum("run" in w for w in here)
