"""Rules about what is updated, by which settings of its own, and when."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.param_groups import read_group
from megatron_lite.config.sections.run import RunConfig


def groups(config: RunConfig, world_size: int) -> Iterator[str]:
    """Each of --param-groups can be read."""
    for text in config.optim.param_groups:
        try:
            read_group(text)
        except ConfigError as error:
            yield f"--param-groups {error}"
