"""The page at /, in headless Chromium: typed into, streamed, stopped, begun anew, and told an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.inference.browser import Page, browsing
from tests.inference.served import LONGEST, Conduct, Server, serving
from tests.support.extras import needs

needs("transformers")
needs("fastapi")
needs("uvicorn")
pytestmark = [pytest.mark.browser, pytest.mark.slow]
ANSWERS = "document.querySelectorAll('.said.assistant').length"
LAST = "[...document.querySelectorAll('.said.assistant')].pop().textContent"
READY = f"{ANSWERS} > 0 && document.getElementById('stop').hidden"
FOCUS = "document.activeElement.id"
SIGHTS = ["phone, light, chat", "desk, dark, chat", "phone, dark, text", "desk, light, text"]
CONTRAST = """
(() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => rgb(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (one) => {
    const color = getComputedStyle(one).backgroundColor;
    return rgb(color)[3] === 0 ? behind(one.parentElement) : color;
  };
  const texts = '.said, .said pre, #error, button, summary, label, input, textarea, h1, p';
  return [...document.querySelectorAll(texts)].map((one) => {
    const [low, high] = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => a - b);
    return [one.id || one.className || one.tagName, (high + 0.05) / (low + 0.05)];
  });
})()
"""


class Sight(NamedTuple):
    """A page, the server that it talks with, and how it looks: a word of each of SIGHTS."""

    page: Page
    server: Server
    words: list[str]

    @property
    def talks(self) -> bool:
        """By a chat template."""
        return "chat" in self.words


@pytest.fixture(scope="module")
def servers(model, renderer) -> Iterator[dict[str, Server]]:
    with serving(*model, chat=renderer) as chat, serving(*model) as text:
        yield {"chat": chat, "text": text}


@pytest.fixture
def sight(request, servers, tmp_path) -> Iterator[Sight]:
    words = request.param.split(", ")
    server = servers[words[2]]
    size = (390, 800) if "phone" in words else (1200, 800)
    with browsing(
        tmp_path / "profile", width=size[0], height=size[1], dark="dark" in words
    ) as page:
        page.call("Page.navigate", url=server.url)
        page.until("document.getElementById('name')?.textContent === 'tiny'")
        yield Sight(page, server, words)
    vars(server.conduct).update(vars(Conduct()))


@pytest.mark.parametrize("sight", SIGHTS, indirect=True)
def test_a_talk_with_the_page(sight) -> None:
    page, server, words = sight
    assert page.value("document.getElementById('most').value") == str(LONGEST // 2)
    server.conduct.step_seconds = 0.05
    page.type("the inner <b>")
    page.until(f"{ANSWERS} === 1 && {LAST}.length > 2")  # it streams
    first = page.value(LAST)
    page.until(f"{LAST}.length > {len(first)}")
    assert page.value("document.querySelector('.said.user').textContent") == "the inner <b>"
    assert page.value("document.getElementById('send').hidden") is True
    page.value("document.getElementById('stop').click()")
    page.until("document.getElementById('stop').hidden")
    server.settle(lambda: server.thread.load.running == 0)  # its row is free
    assert page.value(f"{LAST}.length") < LONGEST // 2
    assert page.value("document.getElementById('error').hidden")

    page.value("document.getElementById('reset').click()")
    assert page.value("document.querySelectorAll('.said').length") == 0
    server.conduct.step_seconds, server.conduct.crashes = 0.0, 1
    page.type("again")
    page.until("!document.getElementById('error').hidden")
    assert "the model failed" in page.value("document.getElementById('error').textContent")
    assert page.value("document.getElementById('text').value") == "again"  # it is not lost
    assert page.value("document.documentElement.scrollWidth <= innerWidth") is True

    page.press("Enter")
    page.until(READY)
    assert page.value("document.getElementById('error').hidden") is True
    dark = page.value("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    assert dark == ("dark" in words)
    loaded_from = page.value("performance.getEntriesByType('resource').map((one) => one.name)")
    assert {url.startswith(server.url) for url in loaded_from} <= {True}  # nothing from elsewhere


@pytest.mark.parametrize("sight", SIGHTS, indirect=True)
def test_what_is_said_is_legible(sight, model) -> None:
    """Code, Chinese, what looks like HTML, words longer than a line; every text stands out."""
    page, server, _ = sight
    before, code, after = "好：", "<b>x</b>" + "y" * 20, "w" * 45
    text = f"{before}\n```py\n{code}\n```\n{after}"
    server.conduct.script = model[1].encode(text)
    page.value(f"document.getElementById('most').value = {len(server.conduct.script)}")
    page.type("the")
    page.until(f"{READY} && {LAST}.endsWith('{after}')")
    boxes = page.value("[...document.querySelectorAll('.said pre')].map((one) => one.textContent)")
    assert boxes == ([code] if sight.talks else [])
    assert page.value(LAST) == (before + code + after if sight.talks else text)
    assert page.value("document.querySelectorAll('.said b').length") == 0
    assert page.value("document.documentElement.scrollWidth <= innerWidth") is True
    assert page.value("document.getElementById('talk').scrollWidth <= innerWidth") is True
    page.value("document.querySelector('details').open = true")
    page.value("fail('what went wrong')")
    low = [one for one in page.value(CONTRAST) if one[1] < 4.5]
    assert not low


@pytest.mark.parametrize("sight", SIGHTS[1:2], indirect=True)
def test_the_page_is_used_with_the_keyboard_and_read_aloud(sight) -> None:
    page, server, _ = sight
    server.conduct.step_seconds = 0.05
    assert page.value(FOCUS) == "text"
    page.call("Input.insertText", text="one")
    page.press("Enter", shift=True)
    page.type("two")
    page.until(f"{ANSWERS} === 1 && {LAST}.length > 2")
    assert page.value("document.querySelector('.said.user').textContent") == "one\ntwo"
    log = "document.querySelector('[role=log]').getAttribute('aria-busy')"
    assert page.value(log) == "true"
    page.press("Escape")
    page.until(f"{READY} && {log} === 'false'")
    server.settle(lambda: server.thread.load.running == 0)
    speakers = page.value("[...document.querySelectorAll('.said')].map((one) => one.ariaLabel)")
    assert speakers == ["You", "Model"]
    reached = []
    for _ in range(6):
        page.press("Tab")
        reached.append(page.value(f"{FOCUS} || document.activeElement.tagName"))
    assert {"send", "SUMMARY", "reset", "talk"} <= set(reached), reached
    named = "(one) => one.ariaLabel || one.labels?.length || one.textContent"
    inputs = "[...document.querySelectorAll('button, input, textarea')]"
    assert page.value(f"{inputs}.every({named}) && {inputs}.length") == 7


@pytest.mark.parametrize("sight", SIGHTS[:1], indirect=True)
def test_what_comes_is_followed_unless_the_reader_looks_back(sight, model) -> None:
    page, server, _ = sight
    server.conduct.script = model[1].encode("a\n" * 40)
    server.conduct.step_seconds = 0.05
    page.value("document.getElementById('most').value = 80")
    page.type("a")
    below = "(t => t.scrollHeight - t.scrollTop - t.clientHeight)(document.getElementById('talk'))"
    page.until(f"{LAST}.length > 60")
    assert page.value(below) < 80
    page.value("document.getElementById('talk').scrollTop = 0")
    page.until(READY)
    assert page.value("document.getElementById('talk').scrollTop") == 0
