"""Token files that all runs of this folder read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.corpora import growing, write_pair


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a small corpus and a shared index cache."""
    folder = tmp_path_factory.mktemp("corpus")
    prefix = write_pair(folder / "text_document", growing(120, 7))
    return [
        "--data-path", prefix, "--split", "80,10,10",
        "--data-cache-path", str(folder / "cache"),
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder that does not exist yet."""
    return tmp_path / "run"
