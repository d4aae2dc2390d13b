"""OpenAI's interface over real sockets: what is answered, and that nothing it is sent blocks it."""

from __future__ import annotations

import http.client
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_lite.cli import generate
from megatron_lite.config.exit import run_tool
from megatron_lite.data.chat.formats import Message
from megatron_lite.inference.generate import Generation, TextRequest
from megatron_lite.inference.sampling import Sampler, Sampling
from megatron_lite.layers.contexts import ForwardContext
from tests.inference.served import serving
from tests.support.extras import needs

needs("transformers")
needs("fastapi")
needs("uvicorn")
pytestmark = pytest.mark.usefixtures("gentle")
PROMPTS = ["the inner thing", "in", "the ether then their hen", "other"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


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


def test_other_routes_methods_and_kinds_of_body(server) -> None:
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask(COMPLETIONS)[0] == 405
    assert server.ask(COMPLETIONS, b"prompt=a", {"content-type": "text/plain"})[0] == 415
    status, listed = server.ask("/v1/models")
    assert status == 200 and [one["id"] for one in listed["data"]] == ["tiny"]
    assert server.ask("/v1/models/tiny")[1] == listed["data"][0]
    assert server.ask("/v1/models/other")[0] == 404
    for path in ("/", "/health", "/v1/models", "/v1/models/tiny"):
        assert headed(server, "HEAD", path) == (200, "")
    assert headed(server, "OPTIONS", COMPLETIONS) == (405, "POST")
    assert headed(server, "DELETE", "/health") == (405, "GET HEAD")
    # a foreign page whose name leads here, in a browser of this machine
    assert server.ask("/v1/models", headers={"host": f"evil.example:{server.port}"})[0] == 403


def headed(server, method: str, path: str) -> tuple[int, str]:
    """Status and what is allowed."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path)
    response = connection.getresponse()
    connection.close()
    return response.status, " ".join(sorted(response.headers.get("allow", "").split(", ")))


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
