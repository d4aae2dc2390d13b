"""What serve.py refuses before it loads a model."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from megatron_lite.cli import serve
from megatron_lite.config.exit import run_tool
from tests.support.extras import needs


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


def test_several_ranks_are_refused(monkeypatch, capsys) -> None:
    needs("fastapi")
    needs("uvicorn")
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, "--port", 0) == 2
    assert "WORLD_SIZE=2" in capsys.readouterr().err


def test_without_its_packages_the_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in ("app", "server"):
        monkeypatch.delitem(sys.modules, f"megatron_lite.inference.serving.{name}", raising=False)
    assert run(monkeypatch, "--port", 0) == 2
    assert "'.[serve]'" in capsys.readouterr().err
