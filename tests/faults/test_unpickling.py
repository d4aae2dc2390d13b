"""No pickle is opened by anything we load, not even by torch for us: an audit hook listens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.planted import plant
from tests.support.places import ROOT
from tests.train.runs import argv

LISTEN = """
import importlib, sys
sys.path.insert(0, {root!r})
heard = []
def hook(event, arguments):
    if event == "pickle.find_class":
        heard.append(" ".join(map(str, arguments)))
sys.addaudithook(hook)
import torch
import pickle
class Watched(pickle.Unpickler):
    def __init__(self, *arguments, **more):
        heard.append("pickle.Unpickler was made")
        super().__init__(*arguments, **more)
def forbidden(name):
    def call(*arguments, **more):
        heard.append(name)
        raise RuntimeError(name + " was called")
    return call
pickle.Unpickler = Watched
torch.load = torch.serialization.load = forbidden("torch.load")
{provoke}
code = 0
sys.argv = {words!r}
try:
    importlib.import_module({main!r}).main(*{arguments!r})
except SystemExit as end:
    code = end.code
print("HEARD", len(heard), *heard[:3], sep="|")
"""


def listen(words: list[str], *, pass_words: bool, provoke: str = "") -> str:
    arguments = [words[1:]] if pass_words else []
    program = LISTEN.format(
        root=str(ROOT),
        words=words,
        arguments=arguments,
        provoke=provoke or "pass",
        main=f"megatron_lite.cli.{Path(words[0]).stem}",
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=180, cwd=ROOT
    )
    assert "HEARD|" in done.stdout, done.stderr[-2000:]
    return done.stdout[done.stdout.index("HEARD|") :].strip()


def train(*words: str) -> list[str]:
    return ["pretrain_gpt.py", *argv(*words)]


@pytest.mark.ci
def test_training_resuming_and_generating_never_unpickle(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--mock-data", "--save", str(run), "--load", str(run), "--save-interval", "2"]
    assert listen(train(*words, "--exit-interval", "2"), pass_words=True) == "HEARD|0"
    assert plant(run, tmp_path / "canary") > 10
    assert listen(train(*words), pass_words=True) == "HEARD|0"
    generate = ["generate.py", "--load", str(run), "--prompt", "1 2",
                "--max-new-tokens", "2", "--use-cpu"]  # fmt: skip
    assert listen(generate, pass_words=False) == "HEARD|0"
    assert not (tmp_path / "canary").exists()
    convert = [
        "convert.py",
        str(run),
        str(tmp_path / "out"),
        "--no-tokenizer",
    ]
    assert listen(convert, pass_words=False) == "HEARD|0"
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_unpickling_is_heard() -> None:
    provoke = "import pathlib; pickle.loads(pickle.dumps(pathlib.PurePath('a')))"
    help_only = ["convert.py", "--help"]
    assert not listen(help_only, pass_words=False, provoke=provoke).startswith("HEARD|0")
