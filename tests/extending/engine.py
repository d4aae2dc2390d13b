"""An engine from outside the package: --extend tests/extending/engine.py --engine apart."""

from __future__ import annotations

from megatron_lite.engines.table import ENGINES
from tests.engines.apart import Apart

ENGINES["apart"] = Apart
