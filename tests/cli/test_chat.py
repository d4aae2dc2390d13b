"""A conversation in the terminal, by the tool's stdin."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.cli import chat
from megatron_lite.cli.speaking import model as speaking
from megatron_lite.data.chat.formats import Message
from megatron_lite.inference.generate import Generation
from megatron_lite.inference.model import load_model
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.huggingface import gpt2, tokenizer_files, tool
from tests.support.places import ROOT

needs("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    gpt2(n_positions=60).save_pretrained(path)
    tokenizer_files(path, "vocab.json", "merges.txt")
    return path


def talk(monkeypatch, capsys, folder: Path, *lines: str, words=()) -> tuple[list[str], str]:
    """What the model said, an answer each, and what the tool said."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    prompts: list[list[int]] = []
    run = Generation.run

    def noted(generation: Generation, requests):
        prompts.extend(list(request.prompt) for request in requests)
        yield from run(generation, requests)

    monkeypatch.setattr(Generation, "run", noted)
    argv = ["--load", folder, "--use-cpu", "--temperature", 0, "--max-new-tokens", 3, *words]
    assert tool(chat.main, monkeypatch, *argv) == 0
    monkeypatch.setattr(Generation, "run", run)
    out, err = capsys.readouterr()
    talk.prompts, talk.out = prompts, out
    return [
        message["content"] for message in json.loads((folder / "said.json").read_text())["messages"]
    ], err


def test_a_conversation_is_told_whole_and_saved(monkeypatch, capsys, folder: Path) -> None:
    save = f"/save {folder / 'said.json'}"
    messages, err = talk(
        monkeypatch, capsys, folder, "the", "", "//in", save, words=["--system", "Be brief."]
    )
    assert "chat template: plain" in err and "5 messages in" in err
    assert [messages[0], messages[1], messages[3]] == ["Be brief.", "the", "/in"]
    assert talk.out == f"{messages[2]}\n{messages[4]}\n"
    tokenizer = load_model(folder).tokenizer
    first = [*tokenizer.encode("Be brief.\nthe"), 261]
    assert talk.prompts[0] == first
    said = tokenizer.encode(messages[2])
    assert talk.prompts[1] == [*first, *said, 261, *tokenizer.encode("/in"), 261]
    with torch.no_grad():
        answer = (
            gpt2(n_positions=60)
            .generate(torch.tensor([first]), max_new_tokens=3, do_sample=False, pad_token_id=261)[
                0, len(first) :
            ]
            .tolist()
        )
    assert messages[2] == tokenizer.decode([n for n in answer if n != 261])


def test_commands_forget_and_tell_anew(monkeypatch, capsys, folder: Path) -> None:
    save = f"/save {folder / 'said.json'}"
    messages, err = talk(
        monkeypatch, capsys, folder, "/help", "one", "/reset", "/shout", "/save /nowhere/at/all\0",
        "/system 你好", "two", save, "/exit", "three",
    )  # fmt: skip
    assert messages[:2] == ["你好", "two"] and len(messages) == 3
    assert (
        "/shout is no command: /reset, /system, /save, /help, /exit" in err and "not saved: " in err
    )
    assert "\n    /system TEXT      another system text" in err
    assert len(talk.prompts) == 2  # nothing after /exit


def test_what_a_template_refuses_does_not_end_the_conversation(
    monkeypatch, capsys, tmp_path, folder
) -> None:
    template = tmp_path / "no_system.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    words = ["--chat-template", template]
    save = f"/save {folder / 'said.json'}"
    messages, err = talk(
        monkeypatch, capsys, folder, "\ufeffthe", save, "/system Be brief.", "lost", "/system",
        "in", save, words=words,
    )  # fmt: skip
    assert messages[0] == "in" and len(messages) == 2 and len(talk.prompts) == 2
    assert talk.prompts[0] == load_model(folder).tokenizer.encode("the")
    assert err.count("not sent: ") == 1 and "no system here" in err
    # what no conversation could be written with is refused before one is begun
    argv = ["--load", folder, "--use-cpu", *words, "--system", "Be brief."]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert tool(chat.main, monkeypatch, *argv) == 3
    assert "no system here" in capsys.readouterr().err


def test_text_that_spells_the_end_of_a_document_does_not_end_it(
    monkeypatch, capsys, folder
) -> None:
    save = f"/save {folder / 'said.json'}"
    messages, _ = talk(monkeypatch, capsys, folder, "a <|endoftext|> b", save)
    assert messages[0] == "a <|endoftext|> b"
    assert talk.prompts[0].count(261) == 1  # the template's own


def test_ctrl_c_ends_an_answer_and_not_the_conversation(monkeypatch, capsys, folder: Path) -> None:
    def broken_off(generation: Generation, requests):
        requests[0].until([requests[0].prompt[0]])
        raise KeyboardInterrupt
        yield

    speaker = load_model(folder).tokenizer
    monkeypatch.setattr(Generation, "run", broken_off)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"the\n/save {folder / 'said.json'}\n"))
    assert tool(chat.main, monkeypatch, "--load", folder, "--use-cpu") == 0
    said = [Message(**one) for one in json.loads((folder / "said.json").read_text())["messages"]]
    assert said == [
        Message("user", "the"),
        Message("assistant", speaker.decode(speaker.encode("the")[:1])),
    ]


@pytest.mark.ci
def test_a_terminal_s_keys_end_an_answer_and_the_conversation(tmp_path: Path) -> None:
    """Ctrl-C as the signal that it is, Ctrl-D as the end of the input."""
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer_files(tmp_path / "model", "vocab.json", "merges.txt")
    argv = [sys.executable, str(ROOT / "tools" / "chat.py"), "--load", str(tmp_path / "model"),
            "--use-cpu", "--max-new-tokens", "1000000", "--top-k", "5", "--seed", "4"]  # fmt: skip
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(argv, **pipes) as process:
        try:
            for _ in range(2):
                process.stdin.write(b"the\n")
                process.stdin.flush()
                assert process.stdout.read(20)  # an answer is coming
                process.send_signal(signal.SIGINT)
            process.stdin.write(f"/save {tmp_path}/said.json\n".encode())
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    said = json.loads((tmp_path / "said.json").read_text())["messages"]
    assert [one["role"] for one in said] == ["user", "assistant"] * 2
    assert all(one["content"] for one in said) and b"Traceback" not in err


def test_a_full_conversation_says_so(monkeypatch, capsys, folder: Path) -> None:
    save = f"/save {folder / 'said.json'}"
    _, err = talk(monkeypatch, capsys, folder, "x" * 58, save, words=["--max-new-tokens", 5])
    assert "has filled the model's 60 positions: /reset" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--max-new-tokens", 0], 2, "--max-new-tokens 0 must be at least 1"),
        (["--chat-template", "chatml"], 2, "has no special token <|im_start|>"),
        (["--chat-template", "none"], 2, "--chat-template none is no file"),
        (["--min-p", 2], 2, "--min-p 2.0"),
        (["--chat-template", "broken.jinja"], 3, "broken.jinja"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_weights_are_read(
    monkeypatch, capsys, folder, words, code, said
) -> None:
    monkeypatch.chdir(folder)
    Path("broken.jinja").write_text("{% for")
    monkeypatch.setattr(speaking, "build_model", None)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert tool(chat.main, monkeypatch, "--load", folder, "--use-cpu", *words) == code
    assert said in capsys.readouterr().err
