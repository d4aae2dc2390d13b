"""The HTTP server around the application: a socket of its own, and connections that do not dawdle."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_lite.config.errors import ConfigError
from megatron_lite.inference.serving.gate import App

CONNECTIONS = 512
STOP_SECONDS = 5
"""Time that answers in flight have left when the server is asked to stop."""
LATE = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain\r\nconnection: close\r\n"
    b"content-length: 39\r\n\r\nthe request's head did not come in time"
)
_BUSY = object()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError where the address is taken or is none of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened at: {reason} - choose another port; "
            "0 takes one that is free"
        ) from None


class Connection(H11Protocol):  # type: ignore[misc, unused-ignore]  # untyped where it is absent
    """Ends where the head of a request does not come within `head_seconds`."""

    head_seconds = 10.0

    def connection_made(self, transport: Any) -> None:
        """Begin to watch."""
        super().connection_made(transport)
        self._watch(_BUSY)

    def _watch(self, before: object) -> None:
        """before: the latest request that was done when it was last looked, or busy."""
        if self.transport.is_closing():
            return
        now = self.cycle if self.cycle is None or self.cycle.response_complete else _BUSY
        if now is before is not _BUSY:
            self.transport.write(LATE)
            self.transport.close()
        else:
            self.loop.call_later(self.head_seconds, self._watch, now)


def make_server(app: App) -> uvicorn.Server:
    """Its run(sockets=[...]) returns when it was asked to stop, or `should_exit` is set."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http=Connection, loop="asyncio", ws="none", lifespan="off", log_level="warning",
            access_log=False, server_header=False, limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )  # fmt: skip
