"""ENGINES: name -> how that engine is made; no other file names an engine's class."""

from __future__ import annotations

from megatron_lite.config.registry import Registry
from megatron_lite.engines.base import MakeEngine
from megatron_lite.engines.deepspeed_zero import DeepSpeedEngine
from megatron_lite.engines.zero import ZeroEngine

ENGINES: Registry[MakeEngine] = Registry(
    "parallel.engine", {"zero": ZeroEngine, "deepspeed": DeepSpeedEngine}
)
