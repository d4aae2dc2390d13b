"""OpenAI's interface as a FastAPI application: bodies in, jobs to the model's thread, answers out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from megatron_lite.config.errors import MegatronLiteError
from megatron_lite.inference.generate import TextRequest
from megatron_lite.inference.serving.answers import Answer, event
from megatron_lite.inference.serving.asked import Asked, Served, completion, conversation
from megatron_lite.inference.serving.fields import RequestRefused, parse_body
from megatron_lite.inference.serving.model_thread import (
    AnswerJob,
    AnswerToken,
    Down,
    Ending,
    Full,
    ModelThread,
)
from megatron_lite.inference.serving.picking import Picker

Read = Callable[[dict[str, Any], Served], Asked]
Arrived = tuple[int, AnswerToken | Ending]

DRAIN = 32
"""A body that is too long is read up to so many times the limit, so that its sender hears why."""

LOOKS = ["GET", "HEAD"]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Of one request.  body_seconds: for its body to come; seconds: for its answer."""

    body_bytes: int
    body_seconds: float
    seconds: float


class Service:
    """What the routes have in common."""

    def __init__(self, served: Served, model: ModelThread, limits: RequestLimits) -> None:
        self.served, self.model, self.limits = served, model, limits
        self._created = int(time.time())
        # one at a time: a long text holds up the next ones, and no stream
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="requests")

    @property
    def card(self) -> dict[str, Any]:
        """The model, as it is listed."""
        return {
            "id": self.served.name, "object": "model", "created": self._created,
            "owned_by": "megatron_lite", "max_model_len": self.served.longest,
            "chat": self.served.chat is not None,
        }  # fmt: skip

    async def answer(self, request: Request, read: Read) -> Response:
        """A completion of either kind."""
        body = await self._body(request)
        asked = await asyncio.get_running_loop().run_in_executor(
            self._reading, self._read, body, read
        )
        answer = Answer(asked, self.served)
        arrived: asyncio.Queue[Arrived] = asyncio.Queue()
        jobs = self._jobs(asked, answer, arrived)
        until = time.monotonic() + self.limits.seconds
        if asked.stream:
            return _Streamed(
                _chunks(answer, jobs, arrived, until), jobs=jobs, seconds=self.limits.seconds
            )
        gone = asyncio.create_task(_disconnected(request))
        coming = asyncio.create_task(_finish(answer, jobs, arrived, until))
        try:
            await asyncio.wait({gone, coming}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse((await coming).whole()) if coming.done() else Response(None, 499)
        finally:
            for task in (gone, coming):
                task.cancel()
            for job in jobs:
                job.cancel()

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # also what a foreign page's form could send without asking first
            raise RequestRefused(
                415, f"the body must be application/json, not {kind or 'nothing'!r:.60}"
            )
        limit = self.limits.body_bytes
        try:
            body = await asyncio.wait_for(_bytes(request, limit), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise RequestRefused(
                408, f"the body did not come within {self.limits.body_seconds:g} seconds"
            ) from None
        if body is None:
            raise RequestRefused(413, f"the body is longer than {limit} bytes")
        return body

    def _read(self, body: bytes, read: Read) -> Asked:
        try:
            return read(parse_body(body), self.served)
        except MegatronLiteError as error:  # of a tokenizer or a template
            raise RequestRefused(400, str(error)) from None

    def _jobs(
        self, asked: Asked, answer: Answer, arrived: asyncio.Queue[Arrived]
    ) -> list[AnswerJob]:
        loop = asyncio.get_running_loop()

        def deliver(index: int, event: AnswerToken | Ending) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(arrived.put_nowait, (index, event))

        jobs = []
        for index in range(len(answer.choices)):
            which = answer.prompt_of(index)
            prompt = asked.prompts[which]
            picker = Picker(asked.settings, index, prompt=len(prompt), ids=self.served.vocab_size)
            request = TextRequest(prompt, asked.max_tokens[which], picker, asked.ends)
            jobs.append(AnswerJob(request, picker, partial(deliver, index)))
        try:
            self.model.submit(jobs)
        except Full:
            raise RequestRefused(
                429, "as many requests wait as may: ask again later", code="rate_limit_exceeded"
            ) from None
        except Down:
            raise RequestRefused(503, "the model is not served any more") from None
        return jobs


async def _bytes(request: Request, limit: int) -> bytes | None:
    """The body; None where it is longer than the limit."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > DRAIN * limit:
        return None
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > DRAIN * limit:
            return None
        if size <= limit:
            body += chunk
    return bytes(body) if size <= limit else None


async def _events(
    answer: Answer, jobs: list[AnswerJob], arrived: asyncio.Queue[Arrived], until: float
) -> AsyncIterator[tuple[int, str]]:
    """(choice, new text) until all have ended; raises RequestRefused where they do not."""
    while not answer.is_whole:
        try:
            index, event = await asyncio.wait_for(arrived.get(), max(until - time.monotonic(), 0))
        except asyncio.TimeoutError:
            raise RequestRefused(504, "the answer took longer than --request-seconds") from None
        choice = answer.choices[index]
        if choice.finish is None:
            new = choice.take(event)
            if choice.finish is not None:
                jobs[index].cancel()
            yield index, new


async def _finish(
    answer: Answer, jobs: list[AnswerJob], arrived: asyncio.Queue[Arrived], until: float
) -> Answer:
    async for _ in _events(answer, jobs, arrived, until):
        pass
    return answer


async def _chunks(
    answer: Answer, jobs: list[AnswerJob], arrived: asyncio.Queue[Arrived], until: float
) -> AsyncIterator[bytes]:
    for chunk in answer.first_chunks():
        yield chunk
    try:
        async for index, new in _events(answer, jobs, arrived, until):
            following = answer.next_chunk(index, new)
            if following is not None:
                yield following
    except RequestRefused as refused:
        yield event(refused.body)
        return
    for chunk in answer.last_chunks():
        yield chunk


class _Streamed(StreamingResponse):
    """Frees its rows however it ends; a client that stops reading holds them no longer than the limit."""

    def __init__(
        self, chunks: AsyncIterator[bytes], *, jobs: list[AnswerJob], seconds: float
    ) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self._jobs, self._seconds = jobs, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all of it."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds + 5)
        finally:
            for job in self._jobs:
                job.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_app(service: Service) -> FastAPI:
    """The routes."""
    app = FastAPI(title="megatron_lite", docs_url=None, redoc_url=None, openapi_url=None)
    page = files("megatron_lite.inference.serving").joinpath("page.html").read_text("utf-8")

    @app.api_route("/", methods=LOOKS)
    async def show_page() -> Response:
        return HTMLResponse(page)

    @app.api_route("/health", methods=LOOKS)
    async def health() -> Response:
        load = service.model.load
        said = {"running": load.running, "waiting": load.waiting, "crashes": load.crashes}
        if load.down:
            return JSONResponse({"status": "down", **said}, 503)
        return JSONResponse({"status": "ok", **said})

    @app.api_route("/v1/models", methods=LOOKS)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.card]})

    @app.api_route("/v1/models/{name:path}", methods=LOOKS)
    async def model(name: str) -> Response:
        if name != service.served.name:
            raise RequestRefused(
                404, f"model {name!r:.60} is not served here", code="model_not_found"
            )
        return JSONResponse(service.card)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, conversation)

    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestRefused)
    async def refused(request: Request, error: RequestRefused) -> Response:
        headers = {} if error.status in (400, 404, 429) else {"connection": "close"}
        if error.status in (429, 503):
            headers["retry-after"] = "1"
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {error.detail}"
        body = RequestRefused(error.status_code, said).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(None, 499)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return JSONResponse(RequestRefused(500, "an error of the server: see its log").body, 500)
