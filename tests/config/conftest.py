"""What tests of config/ share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.ds_files import DsFolder


@pytest.fixture
def ds(tmp_path: Path) -> DsFolder:
    """Writes a ds.json and reads flags beside it."""
    return DsFolder(tmp_path)
