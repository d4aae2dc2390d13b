"""What faults are planted without."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand saves need not reach the device; that fsync is called is another test's claim."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
