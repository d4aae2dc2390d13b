"""What stands before every request: whose page asks, the key, and what browsers are told."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_lite.inference.serving.fields import RequestRefused

AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
App = Callable[[AsgiMessage, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    # the page is one file that loads nothing: what a model says cannot make it
    (b"content-security-policy",
     b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
     b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
)  # fmt: skip


class Gate:
    """An ASGI application around another.

    hosts: names under which it may be asked; None: any.  A foreign page whose name leads to
    this machine is kept out by it.  key: what /v1 must be asked with, if there is one.
    """

    def __init__(self, app: App, *, hosts: frozenset[str] | None, key: str | None) -> None:
        self._app, self._hosts, self._key = app, hosts, key

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_more(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            self._check(scope)
        except RequestRefused as refused:
            await answer(refused, send_more)
            return
        await self._app(scope, receive, send_more)

    def _check(self, scope: AsgiMessage) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and name not in self._hosts:
            raise RequestRefused(
                403, f"the host {name!r:.80} is not served: --allowed-host names others"
            )
        if self._key is None or not scope["path"].startswith("/v1/"):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._key.encode()):
            raise RequestRefused(
                401, "this server wants its key: Authorization: Bearer KEY", code="invalid_api_key"
            )


async def answer(refused: RequestRefused, send: Send) -> None:
    """Send an error; the connection ends, as what it still brings has not been read."""
    body = json.dumps(refused.body).encode()
    headers = [
        (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
