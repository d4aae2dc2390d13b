"""A tiny model, and a server of it that a test leaves as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lite.data.chat.conversation import Renderer, renderer_of
from tests.inference.served import Conduct, Server, loaded, serving, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of Hugging Face's."""
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


@pytest.fixture
def gentle(server) -> Iterator[None]:
    yield
    vars(server.conduct).update(vars(Conduct()))
    server.settle(lambda: server.thread.load.running == server.thread.load.waiting == 0)
