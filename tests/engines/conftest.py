"""Every engine there is."""

from __future__ import annotations

import pytest

from megatron_lite.engines.table import ENGINES


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Its name."""
    return str(request.param)
