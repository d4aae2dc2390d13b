"""OpenAI's interface over real sockets: what is answered, and that nothing it is sent blocks it."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_lite.cli import generate
from megatron_lite.config.exit import run_tool
from megatron_lite.data.chat.conversation import Renderer, renderer_of
from megatron_lite.data.chat.formats import Message
from megatron_lite.inference.generate import Generation, TextRequest
from megatron_lite.inference.sampling import Sampler, Sampling
from megatron_lite.layers.contexts import ForwardContext
from tests.inference.served import LONGEST, Conduct, Conducted, Server, loaded, serving, write_model
from tests.support.extras import needs

needs("transformers")
needs("fastapi")
needs("uvicorn")
PROMPTS = ["the inner thing", "in", "the ether then their hen", "other"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder)


@pytest.fixture(scope="module")
def renderer(model, folder) -> Renderer:
    return renderer_of(model[1], folder, "plain")


@pytest.fixture(scope="module")
def server(model, renderer) -> Iterator[Server]:
    with serving(*model, chat=renderer) as found:
        yield found


@pytest.fixture(autouse=True)
def gentle(server) -> Iterator[None]:
    yield
    vars(server.conduct).update(vars(Conduct()))
    server.settle(lambda: server.thread.load.running == server.thread.load.waiting == 0)


def greedy(model, prompt, new: int = 12) -> list[int]:
    """What follows a text or ids by the likeliest tokens, of the library that generate.py uses."""
    decoder, tokenizer = model
    pick = Sampler(Sampling(temperature=0.0), tokenizer.vocab_size)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    asked = TextRequest(ids, new, pick, frozenset((tokenizer.eod,)))
    return [t.id for t in Generation(decoder).run([asked]) if t.id is not None]


def test_a_completion_is_what_generate_py_says(server, folder, monkeypatch, capsys) -> None:
    words = ["--load", folder, "--prompt", *PROMPTS, "--temperature", 0, "--max-new-tokens", 12]
    monkeypatch.setattr(sys, "argv", ["generate.py", "--use-cpu", *map(str, words)])
    assert run_tool(generate.main) == 0
    expected = capsys.readouterr().out
    status, answer = server.ask(
        COMPLETIONS, {"prompt": PROMPTS, "temperature": 0, "max_tokens": 12, "echo": True}
    )
    assert status == 200, answer
    texts = [choice["text"] for choice in answer["choices"]]
    assert ("-" * 80 + "\n").join(f"{text}\n" for text in texts) == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


def test_a_conversation_is_read_as_chat_py_reads_it(server, model, renderer) -> None:
    turns = [("system", "the"), ("user", "the inner"), ("assistant", "thing"), ("user", "in<eod>")]
    ids = renderer.ids([Message(*turn) for turn in turns])
    messages = [{"role": role, "content": content} for role, content in turns]
    status, answer = server.ask(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 9})
    assert status == 200, answer
    expected = greedy(model, ids, 9)
    assert answer["choices"][0]["message"]["content"] == model[1].decode(expected)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    status, answer = server.ask(CHAT, {"messages": messages[:3]})
    assert status == 400 and "the last message must be of user" in answer["error"]["message"]


def test_a_stream_says_the_same_and_counts(server, model) -> None:
    ids = greedy(model, PROMPTS[0])
    asked = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 12, "model": "tiny"}
    events = server.stream(COMPLETIONS, {**asked, "stream_options": {"include_usage": True}})
    assert events.pop() == "[DONE]"
    usage = events.pop()
    prompt = len(model[1].encode(PROMPTS[0]))
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": len(ids), "total_tokens": prompt + len(ids)}  # fmt: skip
    assert "".join(e["choices"][0]["text"] for e in events) == model[1].decode(ids)
    assert [e["choices"][0]["finish_reason"] for e in events][-2:] == [None, "length"]
    assert {e["object"] for e in events} == {"text_completion"} and len(
        {e["id"] for e in events}
    ) == 1


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(server, model) -> None:
    text = model[1].decode(greedy(model, PROMPTS[0], 40))
    stop = text[5:8]
    asked = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 40, "stop": [stop, "\x00\x01"]}
    status, answer = server.ask(COMPLETIONS, asked)
    (choice,) = answer["choices"]
    assert status == 200 and choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] < 40
    events = server.stream(COMPLETIONS, asked)[:-1]
    assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]


def test_logprobs_are_those_of_the_whole_forward(server, model) -> None:
    decoder, tokenizer = model
    prompt, ids = tokenizer.encode(PROMPTS[0]), greedy(model, PROMPTS[0], 5)
    text = torch.tensor([prompt + ids])
    at = ForwardContext(
        samples=torch.zeros(1, dtype=torch.int64), index=torch.arange(text.shape[1])
    )
    with torch.no_grad():
        logprobs = decoder(text.t(), at)[:, 0, : tokenizer.vocab_size].float().log_softmax(-1)
    rows = logprobs[len(prompt) - 1 : -1]
    expected = rows.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    asked = {"prompt": prompt, "temperature": 0, "max_tokens": 5, "logprobs": 2}
    told = server.ask(COMPLETIONS, asked)[1]["choices"][0]["logprobs"]
    assert told["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert told["tokens"] == [tokenizer.decode([i]) for i in ids]
    best = [max(top.values()) for top in told["top_logprobs"]]
    assert best == told["token_logprobs"]
    chat = {"messages": [{"role": "user", "content": "in"}], "max_tokens": 3, "temperature": 0}
    events = server.stream(CHAT, {**chat, "logprobs": True, "top_logprobs": 2})[1:-1]
    rows = [e["choices"][0]["logprobs"]["content"] for e in events]
    whole = server.ask(CHAT, {**chat, "logprobs": True, "top_logprobs": 2})[1]["choices"][0][
        "logprobs"
    ]
    assert [one["logprob"] for row in rows for one in row] == pytest.approx(
        [one["logprob"] for one in whole["content"]], abs=1e-4)  # fmt: skip
    assert all(len(one["top_logprobs"]) == 2 for one in whole["content"])


def test_a_seed_gives_the_same_draws_and_n_different_ones(server) -> None:
    asked = {"prompt": "the", "max_tokens": 12, "seed": 7, "n": 3, "top_p": 0.9, "top_k": 50}
    texts = [[c["text"] for c in server.ask(COMPLETIONS, asked)[1]["choices"]] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    others = [server.ask(COMPLETIONS, {"prompt": "the", "max_tokens": 12})[1] for _ in range(3)]
    assert len({other["choices"][0]["text"] for other in others}) == 3


def test_penalties_and_biases_change_what_is_likeliest(server, model) -> None:
    asked = {"prompt": "the", "temperature": 0, "max_tokens": 6}
    status, biased = server.ask(COMPLETIONS, {**asked, "logit_bias": {"65": 100}})
    assert status == 200 and biased["choices"][0]["text"] == model[1].decode([65] * 6)
    mild = {**asked, "logit_bias": {"65": 100}, "frequency_penalty": 2, "presence_penalty": 2}
    assert server.ask(COMPLETIONS, mild)[1]["choices"][0]["text"] == model[1].decode([65] * 6)
    banned = server.ask(COMPLETIONS, {**asked, "logit_bias": {str(greedy(model, "the")[0]): -100}})
    assert (
        banned[1]["choices"][0]["text"] != server.ask(COMPLETIONS, asked)[1]["choices"][0]["text"]
    )


@pytest.mark.ci
def test_twenty_clients_at_once_are_all_right_and_none_starves(server, model) -> None:
    prompts = [PROMPTS[n % 4] + " the" * (n // 4) for n in range(20)]
    expected = [model[1].decode(greedy(model, prompt, 10 + n)) for n, prompt in enumerate(prompts)]

    def client(n: int) -> str:
        asked = {"prompt": prompts[n], "temperature": 0, "max_tokens": 10 + n}
        if n % 2:
            events = server.stream(COMPLETIONS, asked)[:-1]
            return "".join(e["choices"][0]["text"] for e in events)
        return str(server.ask(COMPLETIONS, asked)[1]["choices"][0]["text"])

    with ThreadPoolExecutor(20) as clients:
        assert list(clients.map(client, range(20))) == expected
    assert server.thread.load.crashes == 0


def test_short_answers_join_while_long_ones_go_on(server) -> None:
    server.conduct.step_seconds = 0.05
    with ThreadPoolExecutor(3) as clients:
        asked = {"prompt": "the", "logit_bias": {"65": 100}}  # never the end of a text
        long = [
            clients.submit(server.ask, COMPLETIONS, {**asked, "max_tokens": 80}) for _ in range(3)
        ]
        server.settle(lambda: server.thread.load.running == 3)
        for _ in range(2):
            assert server.ask(COMPLETIONS, {**asked, "max_tokens": 2})[0] == 200
        assert not any(one.done() for one in long)
        server.conduct.step_seconds = 0.0


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


def test_a_character_of_several_tokens_comes_whole(server, model) -> None:
    text = "你好，世界 \U0001f600 é!"
    server.conduct.script = model[1].encode(text)
    asked = {"prompt": "the", "max_tokens": len(server.conduct.script), "logit_bias": {"261": -100}}
    assert len(server.conduct.script) > 2 * len(text)
    events = server.stream(COMPLETIONS, {**asked, "n": 2})[:-1]
    for index in (0, 1):
        pieces = [e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == index]
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    whole = server.ask(COMPLETIONS, {**asked, "max_tokens": 4})[1]["choices"][0]["text"]
    assert whole == "你\ufffd"  # cut within the second character
    found = server.ask(COMPLETIONS, {**asked, "stop": "世"})[1]["choices"][0]
    assert (found["text"], found["finish_reason"]) == ("你好，", "stop")


def test_a_seed_gives_the_same_draws_whatever_else_is_in_the_batch(server) -> None:
    asked = {"prompt": PROMPTS[2], "max_tokens": 25, "seed": 11, "temperature": 1.3}
    alone = server.ask(COMPLETIONS, asked)[1]["choices"][0]["text"]
    with ThreadPoolExecutor(9) as clients:
        others = [
            clients.submit(
                server.ask, COMPLETIONS, {"prompt": "x" * 9 * n, "max_tokens": 4 + 3 * n}
            )
            for n in range(8)
        ]
        assert server.ask(COMPLETIONS, asked)[1]["choices"][0]["text"] == alone
        assert {one.result()[0] for one in others} == {200}


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


BAD_TALK = {
    "no messages": ({}, "messages must be a list"),
    "empty": ({"messages": []}, "at least one"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role"),
    "tools": ({"messages": [{"role": "user"}], "tools": [{}]}, "tools [{}] is not served"),
    "top": ({"messages": [{"role": "user"}], "top_logprobs": 2}, "needs logprobs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TALK)
def test_a_conversation_that_cannot_be_answered_says_why(server, case) -> None:
    body, said = BAD_TALK[case]
    status, answer = server.ask(CHAT, body)
    assert status == 400 and said in answer["error"]["message"]


def test_other_routes_methods_and_kinds_of_body(server) -> None:
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask(COMPLETIONS)[0] == 405
    assert server.ask(COMPLETIONS, b"prompt=a", {"content-type": "text/plain"})[0] == 415
    status, listed = server.ask("/v1/models")
    assert status == 200 and [one["id"] for one in listed["data"]] == ["tiny"]
    assert server.ask("/v1/models/tiny")[1] == listed["data"][0]
    assert server.ask("/v1/models/other")[0] == 404
    for path in ("/", "/health", "/v1/models", "/v1/models/tiny"):
        assert headed(server, "HEAD", path) == (200, None)
    assert headed(server, "OPTIONS", COMPLETIONS) == (405, "POST")
    assert headed(server, "DELETE", "/health") == (405, "GET, HEAD")
    # a foreign page whose name leads here, in a browser of this machine
    assert server.ask("/v1/models", headers={"host": f"evil.example:{server.port}"})[0] == 403


def headed(server, method: str, path: str) -> tuple[int, str | None]:
    """Status and what is allowed."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path)
    response = connection.getresponse()
    connection.close()
    return response.status, response.headers["allow"]


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


def test_a_key_is_asked_for_where_one_is_set(model) -> None:
    with serving(*model, key="open-sesame") as server:
        for header in ({}, {"authorization": "Bearer other"}, {"authorization": "open-sesame"}):
            status, answer = server.ask("/v1/models", headers=header)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert server.ask("/v1/models", headers={"authorization": "Bearer open-sesame"})[0] == 200
        assert server.ask("/health")[0] == 200


@pytest.mark.ci
def test_the_openai_library_talks_to_it(server, model) -> None:
    openai = needs("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    assert [one.id for one in client.models.list()] == ["tiny"]
    expected = model[1].decode(greedy(model, PROMPTS[0]))
    done = client.completions.create(
        model="tiny", prompt=PROMPTS[0], temperature=0, max_tokens=12, logprobs=1
    )
    assert done.choices[0].text == expected and len(done.choices[0].logprobs.tokens) == 12
    messages = [{"role": "user", "content": "the thing"}]
    whole = client.chat.completions.create(
        model="tiny",
        messages=messages,
        temperature=0,
        max_tokens=9,
        n=2,
        logprobs=True,
        stop="\x00",
    )
    with client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=9, stream=True,
        stream_options={"include_usage": True},
    ) as chunks:  # fmt: skip
        chunks = list(chunks)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [c.message.content for c in whole.choices] == [text, text] and text
    assert chunks[-1].usage.completion_tokens == 9 and whole.usage.completion_tokens == 18
    several = list(client.completions.create(
        model="tiny", prompt=["the", "in"], n=2, max_tokens=5, seed=4, stream=True, logprobs=3,
    ))  # fmt: skip
    alike = client.completions.create(
        model="tiny", prompt=["the", "in"], n=2, max_tokens=5, seed=4, logprobs=3
    )
    for choice in alike.choices:
        mine = [c.choices[0] for c in several if c.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
        told = choice.logprobs
        assert sum((one.logprobs.tokens for one in mine), []) == told.tokens
        assert len(told.token_logprobs) == len(told.text_offset) == len(told.top_logprobs)
    content = whole.choices[0].logprobs.content
    assert len(content) == 9 and all(one.logprob <= 0 and one.top_logprobs == [] for one in content)
    with pytest.raises(openai.BadRequestError, match="together at most"):
        client.completions.create(model="tiny", prompt="x" * 200)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
