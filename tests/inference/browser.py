"""A headless Chromium that a test types into and looks at, over the pipe of its debugging protocol."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.extras import needs_program

KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}
"""Name -> number and text."""


class Page:
    """One open page."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._calls = write, read, b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]

    def call(self, method: str, **params: object) -> Any:
        """A method of the protocol, and what it returns."""
        self._calls += 1
        asked: dict[str, object] = {"id": self._calls, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                new = os.read(self._read, 1 << 16)
                assert new, "the browser has ended"
                self._rest += new
            message, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(message)
            if found.get("id") == self._calls:
                assert "error" not in found, found
                return found["result"]

    def value(self, expression: str) -> Any:
        """Of an expression of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def type(self, text: str) -> None:
        """Into what has the focus, and Enter."""
        self.call("Input.insertText", text=text)
        self.press("Enter")

    def press(self, name: str, *, shift: bool = False) -> None:
        """A key."""
        number, text = KEYS[name]
        key = {"key": name, "code": name, "windowsVirtualKeyCode": number, "modifiers": 8 * shift}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, **key, **({"text": text} if text else {})
            )

    def until(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"))
            time.sleep(0.02)


@contextmanager
def browsing(folder: Path, *, width: int, height: int, dark: bool) -> Iterator[Page]:
    """A page of a browser whose profile lies in the folder."""
    program = needs_program("chromium", "apt-get install chromium")
    there, write = os.pipe()
    read, back = os.pipe()
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder}", "--remote-debugging-pipe",
    ]  # fmt: skip
    # the browser reads from 3 and writes to 4
    script = 'exec "$@" 3<&"$IN" 4>&"$OUT" 2>/dev/null'
    with subprocess.Popen(
        ["bash", "-c", script, "browser", *command], pass_fds=(there, back),
        env={**os.environ, "IN": str(there), "OUT": str(back)},
    ) as process:  # fmt: skip
        os.close(there)
        os.close(back)
        try:
            page = Page(write, read)
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            page.call("Emulation.setEmulatedMedia", features=[scheme])
            yield page
        finally:
            process.terminate()
            os.close(write)
            os.close(read)
