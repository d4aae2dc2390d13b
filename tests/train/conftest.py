"""Token files that all runs of this folder read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a small corpus and a shared index cache."""
    folder = tmp_path_factory.mktemp("corpus")
    with IndexedDatasetBuilder(folder / "text_document.bin") as builder:
        for number in range(120):
            document = [(number * 7 + k * k) % 60 for k in range(5 + number % 23)] + [60]
            builder.add_document(document, [len(document)])
        builder.finalize()
    return [
        "--data-path", str(folder / "text_document"), "--split", "80,10,10",
        "--data-cache-path", str(folder / "cache"),
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder that does not exist yet."""
    return tmp_path / "run"
