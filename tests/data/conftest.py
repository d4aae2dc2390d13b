"""Small token files and a small vocabulary for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.tokenizers.training import train_bpe
from tests.data.texts import SENTENCES
from tests.support.corpora import write_pair
from tests.support.extras import needs

WriteDocuments = Callable[..., Path]


@pytest.fixture
def write_documents(tmp_path: Path) -> WriteDocuments:
    """write_documents(name, count, seed) -> prefix of `count` random documents ending in id 99."""

    def write(name: str, count: int, seed: int = 0, longest: int = 40) -> Path:
        random = np.random.default_rng(seed)
        lengths = (random.integers(0, longest) for _ in range(count))
        documents = ([*random.integers(0, 99, length), 99] for length in lengths)
        return Path(write_pair(tmp_path / name, documents, np.uint16))

    return write


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A vocabulary of 600 tokens and its merges, trained on SENTENCES."""
    needs("tokenizers")
    folder = tmp_path_factory.mktemp("trained")
    for name, content in train_bpe(SENTENCES * 5, 600, 8).items():
        (folder / name).write_bytes(content)
    return str(folder / "gpt2-vocab.json"), str(folder / "gpt2-merges.txt")
