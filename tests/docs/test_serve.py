"""The guide on serving: its commands are run as they are printed, but for the port."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docs.walking import blocks, in_shell, read
from tests.support.extras import needs, needs_program
from tests.support.huggingface import gpt2, tokenizer_files
from tests.support.spawn import free_port

PRINTED = 8000


def while_served(command: str, port: int, asked: list[str]) -> list[str]:
    """Blocks that are run while a command serves, which then ends with code 0 when it is asked to."""
    begin = (
        f"{command.strip()} >served.txt 2>&1 &\nserver=$!\n"
        f"until curl -sf http://127.0.0.1:{port}/health >health.txt; do sleep 0.2; kill -0 $server; done"
    )
    return [begin, *asked, "kill $server\nwait $server\ncat served.txt"]


@pytest.mark.slow
def test_every_command_of_the_guide_runs(tmp_path: Path) -> None:
    """A model of random weights answers."""
    for module in ("transformers", "fastapi", "uvicorn", "openai"):
        needs(module)
    needs_program("curl", "apt-get install curl")
    gpt2(n_positions=128, n_head=4).save_pretrained(tmp_path / "run")
    tokenizer_files(tmp_path / "run", "vocab.json", "merges.txt")
    port = free_port()
    printed = [code for language, code in blocks(read("serve")) if language == "bash"]
    alone, curl, client, ranks = (code.replace(str(PRINTED), str(port)) for code in printed)
    said = in_shell(
        [*while_served(alone, port, [curl, client]), *while_served(ranks, port, [curl])], tmp_path
    )
    _, first, talked, ended, _, second, ranks_ended = said
    answers = [json.loads("\n".join(lines)) for lines in (first, second)]
    assert answers[0]["choices"][0]["text"] and "\n".join(talked)
    assert answers[0]["usage"] == answers[1]["usage"]
    assert answers[0]["choices"] == answers[1]["choices"]  # two ranks say what one says
    for lines in (ended, ranks_ended):
        assert f"run is served at http://127.0.0.1:{port}/" in lines[0], lines
        assert "FATAL" not in "\n".join(lines)
