"""Every engine that takes all layouts."""

from __future__ import annotations

import pytest

from tests.support.engines import OF_EVERY_LAYOUT


@pytest.fixture(scope="module", params=OF_EVERY_LAYOUT)
def engine(request: pytest.FixtureRequest) -> str:
    """Its name."""
    return str(request.param)
