"""A tiny model behind HTTP, on a free port of loopback, in a thread of the test's own process."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.inference.generate import RunningBatch, TextRequest, Token
from megatron_lite.inference.model import load_model
from megatron_lite.inference.serving.asked import ChatTemplate, Served
from megatron_lite.inference.serving.gate import LOOPBACK, Gate
from megatron_lite.inference.serving.model_thread import ModelThread
from megatron_lite.models.decoder import Decoder
from tests.support.huggingface import gpt2, tokenizer_files

LONGEST = 96


def write_model(folder: Path) -> Path:
    """A GPT-2 of Hugging Face's with 262 ids and LONGEST positions."""
    gpt2(n_positions=LONGEST, n_head=4).save_pretrained(folder)
    tokenizer_files(folder, "vocab.json", "merges.txt")
    return folder


@dataclass
class Conduct:
    """What the running batches of a test do beside their work."""

    step_seconds: float = 0.0
    crashes: int = 0  # so many steps from now on fail
    error: type[BaseException] = RuntimeError  # with which they do
    script: list[int] = field(default_factory=list)  # what the model says in place of its own ids


class Conducted(RunningBatch):
    """A running batch that can be slow, and fail."""

    conduct = Conduct()

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.said: dict[int, int] = {}  # the place in the script of each request

    def join(self, request: int, asked: TextRequest) -> None:
        """What has a script ends with it."""
        super().join(request, replace(asked, ends=frozenset()) if self.conduct.script else asked)

    def step(self) -> list[Token]:
        """One forward."""
        time.sleep(self.conduct.step_seconds)
        if self.conduct.crashes:
            self.conduct.crashes -= 1
            raise self.conduct.error("planted: the device is gone")
        found = super().step()
        for place, token in enumerate(found if self.conduct.script else []):
            said = self.said[token.request] = self.said.get(token.request, -1) + 1
            found[place] = replace(token, id=self.conduct.script[said])
        return found


@dataclass(frozen=True)
class Server:
    """Where it listens, and what it does."""

    port: int
    served: Served
    thread: ModelThread
    conduct: Conduct

    @property
    def url(self) -> str:
        """Of its page."""
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of one request; a body that is bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"content-type": "application/json", **(headers or {})}
        connection.request("POST" if sent is not None else "GET", path, sent, given)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, json.loads(content) if content else None

    def stream(self, path: str, body: dict[str, object]) -> list[Any]:
        """The events of a streamed answer; the last is [DONE] where it is whole."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps({**body, "stream": True}).encode(),
                           {"content-type": "application/json"})  # fmt: skip
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        found = [line[6:] for line in response.read().decode().split("\n\n") if line]
        connection.close()
        return [line if line == "[DONE]" else json.loads(line) for line in found]

    def settle(self, what: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until it is so."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.thread.load
            time.sleep(0.01)


@contextmanager
def serving(
    model: Decoder, tokenizer: Tokenizer, *, rows: int = 4, max_waiting: int = 64,
    key: str | None = None, chat: ChatTemplate | None = None, body_bytes: int = 20_000,
    body_seconds: float = 20.0, seconds: float = 60.0,
) -> Iterator[Server]:  # fmt: skip
    """While it is open, the model is served."""
    from megatron_lite.inference.serving.app import RequestLimits, Service, build_app
    from megatron_lite.inference.serving.server import bind, make_server

    conduct = Conduct()

    class Batch(Conducted):
        """With this server's conduct."""

    Batch.conduct = conduct
    served = Served(
        name="tiny", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size,
        ends=frozenset((tokenizer.eod,)), chat=chat, longest=LONGEST, answers=6,
    )  # fmt: skip
    thread = ModelThread(lambda: Batch(model, rows, LONGEST, chunk=16), max_waiting=max_waiting)
    app = build_app(Service(served, thread, RequestLimits(body_bytes, body_seconds, seconds)))
    server = make_server(Gate(app, hosts=LOOPBACK, key=key))
    listening = bind("127.0.0.1", 0)
    running = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    running.start()
    try:
        yield Server(listening.getsockname()[1], served, thread, conduct)
    finally:
        server.should_exit = True
        thread.close()
        running.join(20)
        listening.close()


def loaded(folder: Path) -> tuple[Decoder, Tokenizer]:
    """The model that write_model has written."""
    found = load_model(folder)
    return found.model, found.tokenizer
