"""What serve.py refuses before it loads a model."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from megatron_lite.cli import launch, serve
from megatron_lite.cli.speaking import model as speaking
from megatron_lite.cli.speaking.model import load_speaker
from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import run_tool
from megatron_lite.data.chat.conversation import Renderer
from megatron_lite.data.chat.formats import Message
from megatron_lite.inference.serving.asked import ChatTemplate
from megatron_lite.parallel.context import ParallelContext
from tests.inference.served import write_model
from tests.support.extras import needs
from tests.support.launch import set_environment
from tests.support.places import ROOT


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--load", "none", "--use-cpu", *map(str, words)])
    return run_tool(serve.main)


def test_flags_that_cannot_be_are_refused_together(monkeypatch, capsys) -> None:
    words = ["--rows", 0, "--port", 99999, "--max-waiting", 2, "--host", "0.0.0.0"]
    assert run(monkeypatch, *words, "--allowed-host", "a.example") == 2
    err = capsys.readouterr().err
    for said in ("--rows 0 must be above 0", "--port 99999", "--max-waiting 2 is below",
                 "--allowed-host is for servers on loopback"):  # fmt: skip
        assert said in err


def test_an_address_that_is_taken_and_a_key_that_is_none(
    monkeypatch, capsys, tmp_path: Path
) -> None:
    needs("fastapi")
    needs("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(monkeypatch, "--port", port) == 2
        assert f"--port {port} cannot be listened at" in capsys.readouterr().err
    (tmp_path / "key").write_text("two words\n")
    assert run(monkeypatch, "--port", 0, "--api-key-file", tmp_path / "key") == 2
    assert "must hold one key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("started", "words", "said"),
    [(2, [], "are 1 ranks, 2 were started"),
     (1, ["--tensor-model-parallel-size", 2], "are 2 ranks, 1 were started")],
    ids=["more", "fewer"],
)  # fmt: skip
def test_ranks_that_the_model_is_not_cut_for_are_refused(
    monkeypatch, capsys, started, words, said
) -> None:
    names = {"RANK": 0, "WORLD_SIZE": started, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    set_environment(monkeypatch, {name: str(value) for name, value in names.items()})
    if started > 1:  # ranks that say it once leave by themselves
        with pytest.raises(SystemExit, check=lambda left: left.code == 2):
            run(monkeypatch, "--port", 0, *words)
    else:
        assert run(monkeypatch, "--port", 0, *words) == 2
    assert said in capsys.readouterr().err


def test_a_launcher_that_is_asked_to_stop_ends_as_the_server_does(monkeypatch) -> None:
    def stopped(asked: object) -> None:
        raise SignalException("stop", signal.SIGTERM)

    monkeypatch.setattr(launch, "_run", stopped)
    codes = {}
    for script in ("serve.py", "generate.py"):
        words = ["launch.py", "--nproc_per_node", "2", str(ROOT / "tools" / script)]
        monkeypatch.setattr(sys, "argv", words)
        codes[script] = run_tool(launch.main)
    assert codes == {"serve.py": 0, "generate.py": 143}


def test_without_its_packages_the_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in ("app", "server"):
        monkeypatch.delitem(sys.modules, f"megatron_lite.inference.serving.{name}", raising=False)
    assert run(monkeypatch, "--port", 0) == 2
    assert "'.[serve]'" in capsys.readouterr().err


def test_a_model_chats_by_its_own_template_or_the_one_asked_for(
    monkeypatch, tmp_path: Path
) -> None:
    needs("transformers")
    folder = write_model(tmp_path / "tiny")

    def chat(*words: str) -> ChatTemplate | None:
        asked = serve._parse(["--load", str(folder), "--use-cpu", *words])
        template = serve._template(asked)
        speaker = load_speaker(asked, ParallelContext.serial(), template.look)
        return serve._served(asked, speaker, template.renderer, longest=9).chat

    assert chat() is None  # a model that was never taught to answer
    plain = chat("--chat-template", "plain")
    assert plain is not None and plain.ids([Message("user", "in")])
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    own = chat()
    assert isinstance(own, Renderer) and own.name.endswith("chat_template.jinja")
    # one of the model's own costs those who talk their answer; one that is asked for must work
    broken = folder / "chat_template.jinja"
    broken.write_text("{% for")
    assert chat() is not None
    monkeypatch.setattr(speaking, "build_model", None)  # no weights are read
    with pytest.raises(DataError, match="chat_template.jinja"):
        chat("--chat-template", str(broken))
