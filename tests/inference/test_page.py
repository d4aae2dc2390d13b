"""The page at /, in headless Chromium: typed into, streamed, stopped, begun anew, and told an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.inference.browser import Page, browsing
from tests.inference.served import Server, loaded, serving, write_model
from tests.support.extras import needs

needs("transformers")
needs("fastapi")
needs("uvicorn")
pytestmark = [pytest.mark.browser, pytest.mark.slow]
ANSWERS = "document.querySelectorAll('.said.assistant').length"
LAST = "[...document.querySelectorAll('.said.assistant')].pop().textContent"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with serving(*loaded(write_model(tmp_path_factory.mktemp("page") / "tiny"))) as found:
        yield found


@pytest.fixture(params=["phone, light", "desk, dark"])
def page(request, server, tmp_path) -> Iterator[Page]:
    width, height = (390, 800) if "phone" in request.param else (1200, 800)
    with browsing(
        tmp_path / "profile", width=width, height=height, dark="dark" in request.param
    ) as page:
        page.call("Page.navigate", url=server.url)
        page.until("document.getElementById('name')?.textContent === 'tiny'")
        page.value("document.getElementById('most').value = 60")
        yield page
    server.conduct.step_seconds = 0.0


def test_a_talk_with_the_page(page, server, request) -> None:
    server.conduct.step_seconds = 0.05
    page.type("the inner <b>thing</b>")
    page.until(f"{ANSWERS} === 1 && {LAST}.length > 2")  # it streams
    first = page.value(LAST)
    page.until(f"{LAST}.length > {len(first)}")
    assert (
        page.value("document.querySelector('.said.user').textContent") == "the inner <b>thing</b>"
    )
    assert page.value("document.getElementById('send').hidden") is True
    page.value("document.getElementById('stop').click()")
    page.until("document.getElementById('stop').hidden")
    server.settle(lambda: server.thread.load.running == 0)  # its row is free
    assert page.value(f"{LAST}.length") < 60 and page.value(
        "document.getElementById('error').hidden"
    )

    server.conduct.step_seconds, server.conduct.crashes = 0.0, 1
    page.type("again")
    page.until("!document.getElementById('error').hidden")
    assert "the model failed" in page.value("document.getElementById('error').textContent")
    assert page.value("document.getElementById('text').value") == "again"  # it is not lost
    assert page.value("document.documentElement.scrollWidth <= innerWidth") is True

    page.value("document.getElementById('text').value = ''")
    page.value("document.getElementById('text').focus()")
    page.type("again")
    page.until(f"{ANSWERS} === 2 && !document.getElementById('send').hidden")
    assert page.value("document.getElementById('error').hidden") is True
    page.value("document.getElementById('reset').click()")
    assert page.value("document.querySelectorAll('.said').length") == 0
    dark = page.value("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    assert dark == ("dark" in request.node.name)
    loaded_from = page.value("performance.getEntriesByType('resource').map((one) => one.name)")
    assert {url.startswith(server.url) for url in loaded_from} <= {True}  # nothing from elsewhere
