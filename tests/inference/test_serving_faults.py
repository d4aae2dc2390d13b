"""Requests that cannot be answered, clients that go away, a model that fails: nothing blocks the server."""

from __future__ import annotations

import json
import socket
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.inference.served import LONGEST, Conducted, serving
from tests.support.extras import needs

needs("transformers")
needs("fastapi")
needs("uvicorn")
pytestmark = pytest.mark.usefixtures("gentle")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize("asked", [
    {"prompt": "the", "max_tokens": 80, "n": 3, "stream": True},
    {"prompt": "the", "max_tokens": 80, "n": 3},
    {"prompt": ["x" * 90] * 3, "max_tokens": 5, "stream": True},  # its prompts are still going in
], ids=["a stream", "an answer", "in prefill"])  # fmt: skip
def test_a_client_that_hangs_up_frees_its_rows(server, asked) -> None:
    server.conduct.step_seconds = 0.05 if asked["max_tokens"] == 80 else 0.5
    client = hung(server, asked)
    server.settle(lambda: server.thread.load.running == 3)
    client.close()
    began = time.monotonic()
    server.settle(lambda: server.thread.load.running == 0)
    assert time.monotonic() - began < 2.0  # 80 tokens take 4 seconds, 6 chunks 3


def test_a_client_that_does_not_read_its_stream_keeps_no_other_waiting(server) -> None:
    client = hung(server, {"prompt": "the", "max_tokens": 90, "n": 4, "stream": True})
    assert server.ask(COMPLETIONS, {"prompt": "the", "max_tokens": 3})[0] == 200
    client.close()


def hung(server, asked: dict[str, object]) -> socket.socket:
    """A client that has asked and reads nothing."""
    body = json.dumps(asked).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def test_a_crash_is_a_5xx_and_those_who_wait_are_served(server) -> None:
    server.conduct.step_seconds = 0.02
    before = server.thread.load.crashes
    with ThreadPoolExecutor(8) as clients:
        asked = {"prompt": "the", "max_tokens": 40, "temperature": 0}
        running = [clients.submit(server.ask, COMPLETIONS, asked) for _ in range(3)]
        streamed = clients.submit(server.stream, COMPLETIONS, asked)
        server.settle(lambda: server.thread.load.running == 4)
        waiting = clients.submit(server.ask, COMPLETIONS, {**asked, "max_tokens": 3})
        server.settle(lambda: server.thread.load.waiting == 1)
        server.conduct.crashes = 1
        for one in running:
            status, body = one.result()
            assert status == 500 and "the model failed" in body["error"]["message"]
        last = streamed.result()[-1]
        assert last["error"]["type"] == "server_error"  # and no [DONE]
        assert waiting.result()[0] == 200
    assert server.thread.load.crashes == before + 1 and server.ask("/health")[0] == 200


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_is_a_5xx_and_the_next_batch_has_the_room(model, error, monkeypatch) -> None:
    """What the failed batch held is free before the next one is made."""
    batches: weakref.WeakSet[Conducted] = weakref.WeakSet()
    held: list[int] = []
    made = Conducted.__init__

    def counted(self, *given, **named) -> None:
        held.append(len(batches))
        made(self, *given, **named)
        batches.add(self)

    monkeypatch.setattr(Conducted, "__init__", counted)
    with serving(*model) as server, ThreadPoolExecutor(3) as clients:
        server.conduct.step_seconds, server.conduct.error = 0.02, error
        asked = {"prompt": "the", "max_tokens": 40, "logit_bias": {"261": -100}}
        running = [clients.submit(server.ask, COMPLETIONS, asked) for _ in range(3)]
        server.settle(lambda: server.thread.load.running == 3)
        server.conduct.crashes = 1
        assert [one.result()[0] for one in running] == [500] * 3
        assert server.ask(COMPLETIONS, {**asked, "max_tokens": 2})[0] == 200
    assert held == [0, 0]


def test_what_is_no_exception_of_the_model_is_no_hang_either(model) -> None:
    with serving(*model) as server:
        server.conduct.crashes, server.conduct.error = 1, SystemExit
        assert server.ask(COMPLETIONS, {"prompt": "the"})[0] == 503
        assert server.ask(COMPLETIONS, {"prompt": "the"})[0] == 503


def test_a_model_that_only_fails_is_given_up(model, capfd) -> None:
    with serving(*model) as server:
        server.conduct.crashes = 10
        found = [server.ask(COMPLETIONS, {"prompt": "the"})[0] for _ in range(4)]
        assert found == [500, 500, 503, 503]
        assert server.ask("/health")[0] == 503
    assert "3 times in a row: it is given up" in capfd.readouterr().err


BAD = {
    "no JSON": (b"{", 400, "no JSON"),
    "a list": ([1], 400, "JSON object"),
    "deep": (b"[" * 9000, 400, "no JSON"),
    "NaN": (b'{"temperature": NaN}', 400, "NaN"),
    "latin-1": (b'{"prompt": "\xe4"}', 400, "no JSON"),
    "half a character's name": (b'{"\\ud800": 1}', 400, "no field"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens 0 must be 1 to"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "half a character"),
    "temperature": ({"temperature": 3}, 400, "temperature 3 must be"),
    "a number in quotes": ({"max_tokens": "5"}, 400, "max_tokens must be a whole number"),
    "true": ({"n": True}, 400, "n must be a whole number"),
    "unknown": ({"max_token": 5}, 400, "'max_token' is no field"),
    "tools": ({"suffix": "x"}, 400, "suffix 'x' is not served"),
    "stops": ({"stop": ["a"] * 5}, 400, "at most 4"),
    "too many": ({"prompt": ["a"] * 3, "n": 3}, 400, "are 9 answers: at most 6"),
    "ids": ({"prompt": [262]}, 400, "ids are 0 to 261"),
    "bias": ({"logit_bias": {"-1": 5}}, 400, "logit_bias '-1'"),
    "model": ({"model": "gpt-4"}, 404, "tiny is"),
    "long": ({"prompt": "x" * LONGEST}, 400, f"together at most {LONGEST}"),
    "huge": (b'{"prompt": "' + b"x" * 400_000 + b'"}', 413, "longer than 20000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_is_a_4xx_that_says_why(server, case) -> None:
    body, status, said = BAD[case]
    found, answer = server.ask(COMPLETIONS, body)
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert said in answer["error"]["message"]


TALK = [{"role": "user", "content": "a"}]
BAD_TALK = {
    "no messages": ({}, "messages must be a list"),
    "empty": ({"messages": []}, "at least one"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role"),
    "tools": ({"messages": TALK, "tools": [{}]}, "tools [{}] is not served"),
    "top": ({"messages": TALK, "top_logprobs": 2}, "needs logprobs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TALK)
def test_a_conversation_that_cannot_be_answered_says_why(server, case) -> None:
    body, said = BAD_TALK[case]
    status, answer = server.ask(CHAT, body)
    assert status == 400 and said in answer["error"]["message"]


def test_slow_requests_end_and_block_nobody(model, monkeypatch) -> None:
    from megatron_lite.inference.serving.server import Connection

    monkeypatch.setattr(Connection, "head_seconds", 0.5)
    with serving(*model, body_seconds=0.5, seconds=0.6) as server:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n".encode()
        body = b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
        for number, client in enumerate(slow):
            client.sendall(head + (body if number % 2 else b""))
        assert server.ask(COMPLETIONS, {"prompt": "the", "max_tokens": 3})[0] == 200
        for client in slow:
            client.settimeout(20)
            assert client.recv(100).startswith(b"HTTP/1.1 408")
            client.close()
        server.conduct.step_seconds = 0.2
        status, answer = server.ask(COMPLETIONS, {"prompt": "the", "max_tokens": 40})
        assert status == 504 and "--request-seconds" in answer["error"]["message"]
        server.settle(lambda: server.thread.load.running == 0)


def test_when_too_many_wait_the_next_hears_429(model) -> None:
    with serving(*model, rows=1, max_waiting=2) as server, ThreadPoolExecutor(3) as clients:
        server.conduct.step_seconds = 0.05
        asked = {"prompt": "the", "max_tokens": 10}
        first = clients.submit(server.ask, COMPLETIONS, asked)
        server.settle(lambda: server.thread.load.running == 1)
        others = [clients.submit(server.ask, COMPLETIONS, asked) for _ in range(2)]
        server.settle(lambda: server.thread.load.waiting == 2)
        assert server.ask(COMPLETIONS, asked)[0] == 429
        assert [one.result()[0] for one in (first, *others)] == [200] * 3
